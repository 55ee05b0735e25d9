"""Score rows and answer prompts with one model, or with one of its adapters."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.core.types import LossSum
from finetune.data.batching import evaluation_batches
from finetune.data.rows import EncodedRow
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.base import InferenceSession
from finetune.evaluation.answers import AnswerFigures, AnswerScore, figures_of, overlap_scorer, score_answer
from finetune.evaluation.metrics import perplexity
from finetune.generation.requests import AnswerOptions, Prompt, TextRequest, answer_all, fit_to_context


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the answer that the data expects."""

    prompt: Prompt
    expected: str
    expected_tokens: int
    is_answer: bool = True  # False: the continuation of a text, of which none is the only right one


@dataclass(frozen=True, slots=True)
class RowFigures:
    """The loss of some rows, in nats per trained token."""

    rows: int
    loss: float
    perplexity: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model did. Loss in nats per trained token."""

    loss: float
    perplexity: float
    accuracy: float
    tokens: int  # trained tokens, those that the loss is over
    undesirable: RowFigures | None  # of the rows with that label, which are in no other figure
    figures: AnswerFigures  # of the answers to what has an answer
    answers: tuple[str, ...]
    judged: tuple[AnswerScore | None, ...]  # each answer; None for the continuation of a text
    seconds: float
    generation_seconds: float

    @property
    def exact_match(self) -> float | None:
        """Share of exact answers; None where nothing has one right answer."""
        return self.figures.exact_match


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The rows and the questions that every model of a comparison gets."""

    rows: Sequence[EncodedRow]
    questions: Sequence[Question]
    tokenizer: TextTokenizer
    context_length: int | None
    max_rows: int = 8
    packing: bool = False  # rows end to end, where the engine prefers it
    undesirable: Sequence[EncodedRow] = ()  # rows labelled so, scored by themselves

    def scores(
        self, session: InferenceSession, *, adapter: str | None = None, progress: Callable[[int], None] | None = None
    ) -> Scores:
        """Loss over all rows and answers to all questions. The loss depends on neither `max_rows` nor `packing`.

        `progress` is told the number of rows scored so far.
        """
        began = time.perf_counter()
        total = self._loss(session, self.rows, adapter, progress)
        undesirable = self._undesirable(session, adapter)
        scored = time.perf_counter()
        answers = self._answers(session, adapter)
        ended = time.perf_counter()
        judged = self._judged(answers)
        return Scores(
            loss=total.mean,
            perplexity=perplexity(total.mean),
            accuracy=total.accuracy,
            tokens=total.tokens,
            undesirable=undesirable,
            figures=self._figures(answers, judged),
            answers=tuple(answers),
            judged=judged,
            seconds=scored - began,
            generation_seconds=ended - scored,
        )

    def _undesirable(self, session: InferenceSession, adapter: str | None) -> RowFigures | None:
        if not self.undesirable:
            return None
        total = self._loss(session, self.undesirable, adapter)
        return RowFigures(len(self.undesirable), total.mean, perplexity(total.mean), total.accuracy)

    def _loss(
        self,
        session: InferenceSession,
        rows: Sequence[EncodedRow],
        adapter: str | None,
        progress: Callable[[int], None] | None = None,
    ) -> LossSum:
        total, done = LossSum(0.0, 0, 0), 0
        batches = evaluation_batches(
            rows, max_rows=self.max_rows, max_tokens=None, pad_id=self.tokenizer.pad_id, packing=self.packing
        )
        for batch in batches:
            total += session.loss(batch, adapter=adapter)
            done += batch.documents
            if progress is not None:
                progress(done)
        return total

    def _judged(self, answers: Sequence[str]) -> tuple[AnswerScore | None, ...]:
        overlap = overlap_scorer() if any(question.is_answer for question in self.questions) else None
        return tuple(
            score_answer(answer, question.expected, overlap) if question.is_answer else None
            for answer, question in zip(answers, self.questions, strict=True)
        )

    def _figures(self, answers: Sequence[str], judged: Sequence[AnswerScore | None]) -> AnswerFigures:
        kept = [number for number, score in enumerate(judged) if score is not None]
        return figures_of(
            [score for score in judged if score is not None],
            [answers[number] for number in kept],
            [self.questions[number].expected for number in kept],
        )

    def _answers(self, session: InferenceSession, adapter: str | None) -> list[str]:
        requests = [
            fit_to_context(TextRequest(question.prompt, _room(question), adapter), self.context_length)
            for question in self.questions
        ]
        return [answer.text for answer in answer_all(session.generator(), requests, self.tokenizer)]


def _room(question: Question) -> AnswerOptions:
    """Greedy, with room for twice the expected answer: a longer one is wrong, and need not be waited for."""
    return AnswerOptions(max_tokens=2 * question.expected_tokens + 16)

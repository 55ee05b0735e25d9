"""Score rows and answer prompts with one model, or with one of its adapters."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.core.types import LossSum
from finetune.data.batching import evaluation_batches
from finetune.data.rows import EncodedRow
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.base import InferenceSession
from finetune.evaluation.metrics import exact_match, perplexity
from finetune.generation.requests import AnswerOptions, Prompt, TextRequest, answer_all, fit_to_context


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the answer that the data expects."""

    prompt: Prompt
    expected: str
    expected_tokens: int
    is_answer: bool = True  # False: the continuation of a text, of which none is the only right one


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model did. Loss in nats per trained token; `exact_match` is None where nothing was answered."""

    loss: float
    perplexity: float
    accuracy: float
    tokens: int  # trained tokens, those that the loss is over
    exact_match: float | None
    answers: tuple[str, ...]
    seconds: float
    generation_seconds: float


@dataclass(frozen=True, slots=True)
class Evaluator:
    """The rows and the questions that every model of a comparison gets."""

    rows: Sequence[EncodedRow]
    questions: Sequence[Question]
    tokenizer: TextTokenizer
    context_length: int | None
    max_rows: int = 8
    packing: bool = False  # rows end to end, where the engine prefers it

    def scores(
        self, session: InferenceSession, *, adapter: str | None = None, progress: Callable[[int], None] | None = None
    ) -> Scores:
        """Loss over all rows and answers to all questions. The loss depends on neither `max_rows` nor `packing`.

        `progress` is told the number of rows scored so far.
        """
        began = time.perf_counter()
        total = self._loss(session, adapter, progress)
        scored = time.perf_counter()
        answers = self._answers(session, adapter)
        ended = time.perf_counter()
        judged = [
            (answer, question.expected)
            for answer, question in zip(answers, self.questions, strict=True)
            if question.is_answer
        ]
        return Scores(
            loss=total.mean,
            perplexity=perplexity(total.mean),
            accuracy=total.accuracy,
            tokens=total.tokens,
            exact_match=exact_match(*zip(*judged, strict=True)) if judged else None,
            answers=tuple(answers),
            seconds=scored - began,
            generation_seconds=ended - scored,
        )

    def _loss(self, session: InferenceSession, adapter: str | None, progress: Callable[[int], None] | None) -> LossSum:
        total, done = LossSum(0.0, 0, 0), 0
        batches = evaluation_batches(
            self.rows, max_rows=self.max_rows, max_tokens=None, pad_id=self.tokenizer.pad_id, packing=self.packing
        )
        for batch in batches:
            total += session.loss(batch, adapter=adapter)
            done += batch.documents
            if progress is not None:
                progress(done)
        return total

    def _answers(self, session: InferenceSession, adapter: str | None) -> list[str]:
        requests = [
            fit_to_context(TextRequest(question.prompt, _room(question), adapter), self.context_length)
            for question in self.questions
        ]
        return [answer.text for answer in answer_all(session.generator(), requests, self.tokenizer)]


def _room(question: Question) -> AnswerOptions:
    """Greedy, with room for twice the expected answer: a longer one is wrong, and need not be waited for."""
    return AnswerOptions(max_tokens=2 * question.expected_tokens + 16)

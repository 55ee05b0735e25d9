"""`ft evaluate`: the base and what was tuned on it, on the same rows, side by side."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.core.errors import DataError, UsageError
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.registry import choose_engine
from finetune.evaluation.answers import AnswerScore, overlap_is_installed
from finetune.evaluation.evaluator import Evaluator, Question, Scores
from finetune.generation.requests import Prompt
from finetune.models.source import ModelSource
from finetune.workflows.opening import (
    TUNED,
    open_session,
    resolve_base,
    say_what_was_assumed,
    trained_template,
    whole_model,
)
from finetune.workflows.rows import HeldOut, rows_of_file, rows_of_run
from finetune.workflows.subjects import Subject, find_subject

GENERATED = 20  # answers where nothing else is asked for
CONTINUED = 3  # continuations of plain text: there is no right one, so they are only to look at

OnNotice = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]  # "base" or "tuned", rows scored, rows in all


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """One held-out prompt with the expected answer and those of the models."""

    prompt: str
    expected: str
    base: str
    tuned: str | None
    base_score: AnswerScore | None = None  # None: plain text, which has more than one right continuation
    tuned_score: AnswerScore | None = None


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The same rows through the base and, where there is one, the tuned model."""

    model: str
    adapter: str | None  # the adapter, or the model that full fine-tuning wrote
    checkpoint: str | None
    data: str
    rows: int
    template: str | None
    base: Scores
    tuned: Scores | None
    samples: tuple[SampleComparison, ...]
    seconds: float


def evaluate(
    run: Path | str | None = None,
    *,
    model: str | None = None,
    adapter: Path | str | None = None,
    data: Path | str | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    generate: int | None = None,
    on_notice: OnNotice = lambda _message: None,
    on_progress: OnProgress = lambda _which, _done, _all: None,
) -> EvaluationResult:
    """Loss, perplexity, accuracy and the figures of answers of base and tuned model, without merging.

    The rows are the run's validation rows, made again and checked against its fingerprint, or those of `data`.
    `limit` takes the first rows only; `generate` is the number of prompts that are answered, greedily.
    """
    began = time.perf_counter()
    _check_counts(limit, generate)
    subject = find_subject(
        None if run is None else Path(run),
        model=model,
        adapter=None if adapter is None else Path(adapter),
        checkpoint=checkpoint,
        backend=backend,
        device=device,
    )
    say_what_was_assumed(subject, on_notice)
    source = resolve_base(subject)
    tokenizer = TextTokenizer.open(source.path)
    rows = _rows(subject, source, tokenizer, data=data, template=template, generate=generate, on_notice=on_notice)
    held_out = _usable(rows.first(limit), all_answered=generate is not None)
    questions = _questions(held_out, source, tokenizer, on_notice)
    evaluator = _evaluator(subject, source, tokenizer, held_out, questions=questions, on_notice=on_notice)
    base, tuned = _scores(subject, source, evaluator, on_progress)
    return EvaluationResult(
        model=subject.model.name,
        adapter=next((str(path) for path in (subject.adapter, subject.tuned_model) if path is not None), None),
        checkpoint=subject.checkpoint,
        data=held_out.data,
        rows=len(held_out.rows),
        template=held_out.template.name,
        base=base,
        tuned=tuned,
        samples=_samples(questions, base, tuned),
        seconds=time.perf_counter() - began,
    )


def _evaluator(
    subject: Subject,
    source: ModelSource,
    tokenizer: TextTokenizer,
    held_out: HeldOut,
    *,
    questions: list[Question],
    on_notice: OnNotice,
) -> Evaluator:
    if subject.model.init == "random":
        on_notice("The run started from random weights: `base` is another draw of them, not the run's own.")
    if any(question.is_answer for question in questions) and not overlap_is_installed():
        on_notice("ROUGE and BLEU are left out: they need rouge-score and sacrebleu (pip install 'finetune[metrics]').")
    return Evaluator(
        held_out.rows,
        questions,
        tokenizer,
        source.context_length,
        packing=choose_engine(subject.model).packs_rows,
        undesirable=held_out.undesirable,
    )


def _check_counts(limit: int | None, generate: int | None) -> None:
    problems = [
        *([f"--limit {limit}: give at least 1"] if limit is not None and limit < 1 else []),
        *([f"--generate {generate}: give 0 (none) or more"] if generate is not None and generate < 0 else []),
    ]
    if problems:
        raise UsageError("\n".join(["These options cannot be used:", *(f"  {text}" for text in problems)]))


def _rows(
    subject: Subject,
    source: ModelSource,
    tokenizer: TextTokenizer,
    *,
    data: Path | str | None,
    template: str | None,
    generate: int | None,
    on_notice: OnNotice,
) -> HeldOut:
    samples = GENERATED if generate is None else generate
    if data is None and subject.run is None:
        raise UsageError("There are no rows to evaluate on. Give --data, or a run, whose validation rows are used.")
    if data is None and subject.run is not None:
        return rows_of_run(subject.run, tokenizer, source, samples=samples, template=template)
    return rows_of_file(
        Path(str(data)),
        tokenizer,
        source,
        config=None if subject.run is None else subject.run.config.data,
        samples=samples,
        template=template or trained_template(subject),
        on_notice=on_notice,
    )


def _usable(held_out: HeldOut, *, all_answered: bool) -> HeldOut:
    """Rows to evaluate on; of plain text a few samples, unless their number was asked for."""
    if not held_out.rows:
        raise DataError(f"{held_out.data} has no row to evaluate on. Give another file with --data.")
    if all_answered or any(sample.is_answer for sample in held_out.samples):
        return held_out
    return replace(held_out, samples=held_out.samples[:CONTINUED])


def _questions(held_out: HeldOut, source: ModelSource, tokenizer: TextTokenizer, on_notice: OnNotice) -> list[Question]:
    """The prompts that leave room for an answer; the others are counted and said."""
    limit = source.context_length
    fitting = [sample for sample in held_out.samples if limit is None or len(sample.prompt_ids) < limit]
    if len(fitting) < len(held_out.samples):
        left_out = len(held_out.samples) - len(fitting)
        on_notice(f"{left_out} prompts fill the context of {limit:,} tokens and are not answered.")
    template = held_out.template
    stop_tokens, stop_strings = template.stop_ids(tokenizer), template.stop_strings
    return [
        Question(
            Prompt(sample.prompt, sample.prompt_ids, stop_tokens, stop_strings),
            sample.expected,
            len(tokenizer.encode(sample.expected)[0]),
            sample.is_answer,
        )
        for sample in fitting
    ]


def _scores(
    subject: Subject, source: ModelSource, evaluator: Evaluator, on_progress: OnProgress
) -> tuple[Scores, Scores | None]:
    """One base in memory for both; a model that full fine-tuning wrote is loaded after the base is gone."""
    rows = len(evaluator.rows)

    def progress(which: str) -> Callable[[int], None]:
        return lambda done: on_progress(which, done, rows)

    adapters = {} if subject.adapter is None else {TUNED: subject.adapter}
    with open_session(subject.model, source.path, adapters) as session:
        base = evaluator.scores(session, progress=progress("base"))
        if subject.adapter is not None:
            return base, evaluator.scores(session, adapter=TUNED, progress=progress("tuned"))
    if subject.tuned_model is None:
        return base, None
    with open_session(whole_model(subject.model), subject.tuned_model) as session:
        return base, evaluator.scores(session, progress=progress("tuned"))


def _samples(questions: list[Question], base: Scores, tuned: Scores | None) -> tuple[SampleComparison, ...]:
    return tuple(
        SampleComparison(
            question.prompt.text,
            question.expected,
            base.answers[number],
            tuned.answers[number] if tuned else None,
            base.judged[number],
            tuned.judged[number] if tuned else None,
        )
        for number, question in enumerate(questions)
    )

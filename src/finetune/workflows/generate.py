"""`ft generate`: one prompt and one answer, or a file of prompts that are answered together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.core.errors import UsageError
from finetune.core.types import FinishReason
from finetune.generation.prompt_files import Asked
from finetune.generation.requests import (
    Answer,
    AnswerOptions,
    TextPiece,
    TextRequest,
    check_options,
    fit_to_context,
    in_order,
    stream,
)
from finetune.workflows.opening import OpenedSubject, open_subject
from finetune.workflows.subjects import find_subject

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """The answer to prompt number `index`, counted from 0. `tokens` counts the decoded tokens."""

    index: int
    rendered_prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What answered a file of prompts, and what it took; `seconds` leaves loading out."""

    model: str
    adapter: str | None
    template: str | None  # None: the prompts were given to the model as raw text
    answers: tuple[GeneratedAnswer, ...]
    seconds: float
    seed: int

    @property
    def tokens(self) -> int:
        """Decoded tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """An answer and what it took. `tokens` counts the decoded tokens; `seconds` leaves loading out."""

    model: str
    adapter: str | None
    template: str | None  # None: the prompt was given to the model as raw text
    prompt: str
    rendered_prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: FinishReason
    seconds: float
    tokens_per_second: float
    seed: int


def generate(
    prompt: str,
    *,
    model: str | None = None,
    adapter: Path | str | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    options: AnswerOptions | None = None,
    template: str | None = None,
    system: str | None = None,
    raw: bool = False,
    on_text: Callable[[str], None] = lambda _text: None,
    on_notice: Callable[[str], None] = lambda _message: None,
) -> GenerationResult:
    """Answer one prompt. `model` or `adapter` may be a run's directory; `on_text` gets the answer as it grows.

    The prompt is a user message where a template is known (`template`, the run's, the tokenizer's), else raw text.
    """
    report = generate_all(
        [prompt],
        model=model,
        adapter=adapter,
        checkpoint=checkpoint,
        backend=backend,
        device=device,
        options=options,
        template=template,
        system=system,
        raw=raw,
        on_piece=lambda piece: on_text(piece.text),
        on_notice=on_notice,
    )
    [answer] = report.answers
    return GenerationResult(
        model=report.model,
        adapter=report.adapter,
        template=report.template,
        prompt=prompt,
        rendered_prompt=answer.rendered_prompt,
        text=answer.text,
        prompt_tokens=answer.prompt_tokens,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        seconds=report.seconds,
        tokens_per_second=answer.tokens / report.seconds,
        seed=report.seed,
    )


def generate_all(
    asked: Sequence[Asked | str],
    *,
    model: str | None = None,
    adapter: Path | str | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    options: AnswerOptions | None = None,
    template: str | None = None,
    system: str | None = None,
    raw: bool = False,
    on_piece: Callable[[TextPiece], None] = lambda _piece: None,
    on_answer: Callable[[GeneratedAnswer], None] = lambda _answer: None,
    on_notice: Callable[[str], None] = lambda _message: None,
) -> GenerationReport:
    """Answer prompts together, each as it would be alone. Pieces and answers come in the order of the prompts.

    Raises UsageError, before anything is answered, with all prompts that leave no room for an answer.
    """
    options = options or AnswerOptions()
    check_options(options)
    subject = find_subject(
        model=model,
        adapter=None if adapter is None else Path(adapter),
        checkpoint=checkpoint,
        backend=backend,
        device=device,
    )
    with open_subject(subject, template=template, raw=raw, on_notice=on_notice) as opened:
        prompts = [Asked(text=one) if isinstance(one, str) else one for one in asked]
        requests = _requests(prompts, opened, options, system)
        answers = []
        began = time.perf_counter()
        for piece in in_order(stream(opened.session.generator(), requests, opened.tokenizer)):
            on_piece(piece)
            if piece.answer is not None:
                answers.append(_answered(piece.index, requests[piece.index], piece.answer))
                on_answer(answers[-1])
        seconds = time.perf_counter() - began
    return GenerationReport(
        model=subject.model.name,
        adapter=None if subject.adapter is None else str(subject.adapter),
        template=opened.template_name,
        answers=tuple(answers),
        seconds=seconds,
        seed=options.sampling.seed,
    )


def _requests(
    asked: Sequence[Asked], opened: OpenedSubject, options: AnswerOptions, system: str | None
) -> list[TextRequest]:
    """Every prompt as the model reads it, or one error with all that do not fit."""
    requests, problems = [], []
    for one in asked:
        request = TextRequest(one.prompt(opened.prompter, system=system), options, opened.adapter)
        try:
            requests.append(fit_to_context(request, opened.source.context_length))
        except UsageError as error:
            problems.append(str(error) if one.origin is None else f"{one.origin}: {error}")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more prompts"] if len(problems) > _SHOWN else []
        raise UsageError("\n".join([*problems[:_SHOWN], *more]))
    return requests


def _answered(index: int, request: TextRequest, answer: Answer) -> GeneratedAnswer:
    return GeneratedAnswer(
        index=index,
        rendered_prompt=request.prompt.text,
        text=answer.text,
        prompt_tokens=len(request.prompt.ids),
        tokens=len(answer.tokens),
        finish_reason=answer.finish_reason,
    )

"""`ft generate`: one prompt, one answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.core.types import FinishReason
from finetune.generation.requests import Answer, AnswerOptions, TextRequest, check_options, fit_to_context, stream
from finetune.workflows.opening import open_subject
from finetune.workflows.subjects import find_subject


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
        request = TextRequest(opened.prompter.prompt(prompt, system=system), options, opened.adapter)
        request = fit_to_context(request, opened.source.context_length)
        began = time.perf_counter()
        answer: Answer | None = None
        for piece in stream(opened.session.generator(), [request], opened.tokenizer):
            on_text(piece.text)
            answer = piece.answer
        seconds = time.perf_counter() - began
    assert answer is not None  # a stream ends with the piece that carries the answer
    return GenerationResult(
        model=subject.model.name,
        adapter=None if subject.adapter is None else str(subject.adapter),
        template=opened.template_name,
        prompt=prompt,
        rendered_prompt=request.prompt.text,
        text=answer.text,
        prompt_tokens=len(request.prompt.ids),
        tokens=len(answer.tokens),
        finish_reason=answer.finish_reason,
        seconds=seconds,
        tokens_per_second=len(answer.tokens) / seconds,
        seed=options.sampling.seed,
    )

"""`ft generate`: one prompt, one answer."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output

if TYPE_CHECKING:
    from finetune.workflows.generate import GenerationResult

Raw = Annotated[bool, typer.Option("--raw", help="Give the prompt to the model as it is, without a template.")]


def generate(
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer, or with --raw to continue.")],
    model: answers.Model = None,
    adapter: answers.Adapter = None,
    checkpoint: answers.Checkpoint = None,
    backend: answers.Backend = None,
    device: answers.Device = None,
    max_tokens: answers.MaxTokens = 256,
    temperature: answers.Temperature = 0.0,
    top_p: answers.TopP = 1.0,
    top_k: answers.TopK = 0,
    min_p: answers.MinP = 0.0,
    repetition_penalty: answers.Penalty = 1.0,
    stop: answers.Stop = None,
    seed: answers.Seed = 0,
    template: answers.Template = None,
    system: answers.System = None,
    raw: Raw = False,
    json: JsonOption = False,
) -> None:
    """Answer one prompt with a model, with or without an adapter.

    The run's template, or the tokenizer's, renders the prompt; without one it is raw text. Only the answer goes to
    standard output, as it grows.

    \b
    Examples:
      ft generate --model outputs/mine --prompt "Wake me at seven" --backend mlx --json
      ft generate --model MODEL --adapter outputs/mine/adapter --prompt "Hello" --temperature 0.7 --top-p 0.9
      ft generate --model MODEL --raw --prompt "Once upon a time"
    """
    from finetune.workflows import generate as workflow

    options = answers.answer_options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    with quiet_output(json):
        result = workflow.generate(
            prompt,
            model=model,
            adapter=adapter,
            checkpoint=checkpoint,
            backend=backend,
            device=device,
            options=options,
            template=template,
            system=system,
            raw=raw,
            on_text=_ignore if json else _show,
            on_notice=note,
        )
    _end(result, json=json)


def _end(result: "GenerationResult", *, json: bool) -> None:
    """The document, or the end of the answer's line and what it took."""
    if json:
        print_json(asdict(result))
        return
    typer.echo()
    ended = "ended by itself" if result.finish_reason == "stop" else "cut at the limit of tokens"
    note(f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s, {ended}")


def _ignore(_text: str) -> None:
    """With --json the answer is part of the document."""


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

"""`ft generate`: answers to one prompt, to a file of prompts, or to what comes through a pipe."""

import json as json_text
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output
from finetune.core.errors import UsageError

if TYPE_CHECKING:
    from finetune.generation.prompt_files import Asked
    from finetune.generation.requests import TextPiece
    from finetune.workflows.generate import GeneratedAnswer, GenerationReport, GenerationResult

Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="What to answer, or with --raw to continue; - reads it from a pipe."),
]
Input = Annotated[
    Path | None,
    typer.Option("--input", "-i", help="A file of prompts: one a line, or JSON rows; - or none: a pipe."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the answers of a file of prompts here, as JSON lines.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Give the prompt to the model as it is, without a template.")]
PIPE = Path("-")


def generate(
    *,
    prompt: Prompt = None,
    input: Input = None,
    output: Output = None,
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
    """Answer prompts with a model, with or without an adapter.

    The run's template, or the tokenizer's, renders a prompt; without one it is raw text. Only answers go to standard
    output. Prompts of a file (--input) are answered together, and the answers come in their order: as text, or with
    --json or --output as JSON lines. A JSON row has `prompt` (and `system`), or `messages` (and `tools`).

    \b
    Examples:
      ft generate --model outputs/mine --prompt "Wake me at seven" --backend mlx --json
      ft generate --model MODEL --adapter outputs/mine/adapter --prompt "Hello" --temperature 0.7 --top-p 0.9
      ft generate --model MODEL --raw --prompt "Once upon a time"
      ft generate --model outputs/mine --input prompts.jsonl --output answers.jsonl
      cat questions.txt | ft generate --model outputs/mine
    """
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
    where: dict[str, Any] = {"model": model, "adapter": adapter, "checkpoint": checkpoint}
    where |= {"backend": backend, "device": device, "options": options, "template": template, "system": system}
    asked = _file_of_prompts(prompt, input, output)
    if asked is None:
        _one(str(prompt), {**where, "raw": raw}, json=json)
    else:
        _all(asked, output, {**where, "raw": raw}, json=json)


def _one(prompt: str, where: dict[str, Any], *, json: bool) -> None:
    """Answer the prompt of the command line, or the whole of what comes through a pipe."""
    from finetune.workflows import generate as workflow

    text = sys.stdin.read() if prompt == str(PIPE) else prompt
    with quiet_output(json):
        result = workflow.generate(text, on_text=_ignore if json else _show, on_notice=note, **where)
    _end(result, json=json)


def _all(asked: "list[Asked]", output: Path | None, where: dict[str, Any], *, json: bool) -> None:
    """Answer the prompts of a file."""
    from finetune.workflows import generate as workflow

    with _lines(output, asked, json=json) as lines, quiet_output(json):
        listener: dict[str, Any] = {"on_answer": lines.write} if lines else {"on_piece": _show_piece}
        report = workflow.generate_all(asked, on_notice=note, **listener, **where)
    _end_all(report, json=json and output is not None)


def _file_of_prompts(prompt: str | None, given: Path | None, output: Path | None) -> "list[Asked] | None":
    """The prompts of a file or a pipe; None where there is one on the command line."""
    from finetune.generation.prompt_files import parse_prompts, read_prompts

    if prompt is not None:
        if given is not None or output is not None:
            other = "--input" if given is not None else "--output"
            raise UsageError(
                f"--prompt and {other} are both given: {other} is for a file of prompts. Give one of them."
            )
        return None
    if given is not None and given != PIPE:
        if output is not None and output.exists() and given.exists() and output.samefile(given):
            raise UsageError(f"--output {output} is the file of the prompts. Give another name.")
        return read_prompts(given)
    if sys.stdin.isatty() and given is None:
        raise UsageError("Nothing to answer. Give --prompt TEXT, --input FILE, or prompts through a pipe.")
    return parse_prompts(Path("standard input"), sys.stdin.read())


class _JsonLines:
    """Writes one line an answer, with the prompt that it answers, as soon as it is there."""

    def __init__(self, file: TextIO, asked: "list[Asked]") -> None:
        self._file = file
        self._asked = asked

    def write(self, answer: "GeneratedAnswer") -> None:
        one = self._asked[answer.index]
        messages = [{"role": message.role, "content": message.content} for message in one.messages]
        document = {"index": answer.index, **({"messages": messages} if messages else {"prompt": one.text})}
        document |= {key: value for key, value in asdict(answer).items() if key not in {"index", "rendered_prompt"}}
        self._file.write(json_text.dumps(document, ensure_ascii=False) + "\n")
        self._file.flush()


@contextmanager
def _lines(output: Path | None, asked: "list[Asked]", *, json: bool) -> "Iterator[_JsonLines | None]":
    """Where JSON lines go; None where answers are shown as text."""
    if output is None:
        yield _JsonLines(sys.stdout, asked) if json else None
        return
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}. Give another file.") from None
    with file:
        yield _JsonLines(file, asked)


def _end(result: "GenerationResult", *, json: bool) -> None:
    """The document, or the end of the answer's line and what it took."""
    if json:
        print_json(asdict(result))
        return
    typer.echo()
    ended = "ended by itself" if result.finish_reason == "stop" else "cut at the limit of tokens"
    note(f"{result.tokens:,} tokens, {result.tokens_per_second:,.0f} tokens/s, {ended}")


def _end_all(report: "GenerationReport", *, json: bool) -> None:
    """What it took, and with --json and --output as a document, as the answers are in the file."""
    cut = sum(answer.finish_reason == "length" for answer in report.answers)
    figures = {"answers": len(report.answers), "cut": cut, "tokens": report.tokens, "seconds": report.seconds}
    if json:
        print_json({"model": report.model, "adapter": report.adapter, "template": report.template, **figures})
    rate = report.tokens / report.seconds
    note(f"{len(report.answers):,} answers, {report.tokens:,} tokens, {rate:,.0f} tokens/s, {cut:,} cut at the limit")


def _ignore(_text: str) -> None:
    """With --json the answer is part of the document."""


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show_piece(piece: "TextPiece") -> None:
    """Answers one after the other, with an empty line behind each."""
    _show(piece.text if piece.answer is None else f"{piece.text}\n\n")

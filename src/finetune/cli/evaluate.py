"""`ft evaluate`: base and tuned model on the same rows, side by side."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output

if TYPE_CHECKING:
    from finetune.evaluation.evaluator import Scores
    from finetune.workflows.evaluate import EvaluationResult

SHOWN_SAMPLES = 3
LONGEST_SHOWN = 240  # characters of a sample on the terminal; --json has all


def evaluate(
    *,
    run: Annotated[
        Path | None, typer.Argument(help="A run's directory: model, adapter, template and rows are its own.")
    ] = None,
    model: answers.Model = None,
    adapter: answers.Adapter = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="A file of rows; default: the run's validation rows.")
    ] = None,
    checkpoint: answers.Checkpoint = None,
    backend: answers.Backend = None,
    device: answers.Device = None,
    template: answers.Template = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows.")] = None,
    generate: Annotated[
        int | None,
        typer.Option("--generate", help="Prompts to answer, for exact match and samples; default: 20 (plain text: 3)."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure a model on held-out rows: loss, perplexity, accuracy, exact match, and sample answers.

    With an adapter or a run, the base is measured beside it, on the same rows and without merging.

    \b
    Examples:
      ft evaluate outputs/mine
      ft evaluate outputs/mine --checkpoint best --data test.jsonl --json
      ft evaluate --model MODEL --adapter outputs/mine/adapter --data test.jsonl --limit 100
      ft evaluate --model demo --data examples/sample_dataset.json
    """
    from finetune.workflows import evaluate as workflow

    with quiet_output(json):
        result = workflow.evaluate(
            run,
            model=model,
            adapter=adapter,
            data=data,
            checkpoint=checkpoint,
            backend=backend,
            device=device,
            template=template,
            limit=limit,
            generate=generate,
            on_notice=note,
            on_progress=_progress,
        )
    if json:
        print_json(document(result))
    else:
        _show(result)


def _progress(which: str, done: int, rows: int) -> None:
    """One line that counts up, on a terminal only."""
    if sys.stderr.isatty():
        typer.echo(f"\r{which}: {done:,} of {rows:,} rows", err=True, nl=done == rows)


def document(result: "EvaluationResult") -> dict[str, Any]:
    """The JSON document: answers stand in `samples`, beside each other."""
    head = {key: value for key, value in asdict(result).items() if key not in {"base", "tuned"}}
    scores = {"base": _figures(result.base)}
    if result.tuned is not None:
        scores["tuned"] = _figures(result.tuned)
    samples, seconds = head.pop("samples"), head.pop("seconds")
    return {**head, **scores, "samples": samples, "seconds": seconds}


def _figures(scores: "Scores") -> dict[str, Any]:
    figures = {key: value for key, value in asdict(scores).items() if key != "answers"}
    if scores.exact_match is None:
        del figures["exact_match"]
    return figures


def _show(result: "EvaluationResult") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    tuned = f" and {result.adapter}" if result.adapter else ""
    chosen = f" [{result.checkpoint}]" if result.checkpoint else ""
    console.print(Text(f"{result.model}{tuned}{chosen} on {result.rows:,} rows of {result.data}"))
    table = Table("", "base", *(["tuned"] if result.tuned else []))
    for label, values in _table_rows(result):
        table.add_row(label, *values)
    console.print(table)
    for sample in result.samples[:SHOWN_SAMPLES]:
        console.print(Text("\nPrompt    ", style="bold"), Text(_short(sample.prompt)), sep="")
        answers_given = {"Expected": sample.expected, "Base": sample.base, "Tuned": sample.tuned}
        for label, answer in answers_given.items():
            if answer is not None:
                console.print(Text(f"{label:<10}", style="bold"), Text(_short(answer)), sep="")


def _table_rows(result: "EvaluationResult") -> list[tuple[str, list[str]]]:
    both = [scores for scores in (result.base, result.tuned) if scores is not None]
    rows = [
        ("loss", [f"{scores.loss:.4f}" for scores in both]),
        ("perplexity", [f"{scores.perplexity:,.3f}" for scores in both]),
        ("token accuracy", [f"{scores.accuracy:.1%}" for scores in both]),
    ]
    matches = [scores.exact_match for scores in both if scores.exact_match is not None]
    if matches:
        rows.append((f"exact match ({len(result.samples)} answers)", [f"{share:.1%}" for share in matches]))
    if result.samples:
        rows.append(("seconds of generation", [f"{scores.generation_seconds:.1f}" for scores in both]))
    rows.append(("seconds of scoring", [f"{scores.seconds:.1f}" for scores in both]))
    return rows


def _short(text: str) -> str:
    """One line on the terminal, cut in the middle where it is long."""
    line = text.replace("\n", "⏎ ")
    half = LONGEST_SHOWN // 2
    return line if len(line) <= LONGEST_SHOWN else f"{line[:half]} … {line[-half:]}"

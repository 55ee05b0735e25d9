"""`ft evaluate`: base and tuned model on the same rows, side by side."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output

if TYPE_CHECKING:
    from finetune.evaluation.evaluator import Scores
    from finetune.workflows.evaluate import EvaluationResult

SHOWN_SAMPLES = 3
_ANSWER_LABELS = {
    "exact_match": "exact match",
    "json_valid": "valid JSON",
    "json_equal": "equal JSON",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU (0 to 100)",
}
LONGEST_SHOWN = 240  # characters of a sample on the terminal; --json has all

Data = Annotated[Path | None, typer.Option("--data", "-d", help="A file of rows; default: the run's validation rows.")]
Generate = Annotated[
    int | None,
    typer.Option("--generate", help="Prompts to answer, for exact match and samples; default: 20 (plain text: 3)."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write figures and answers to a .json file, or the answers to a .jsonl."),
]


def evaluate(
    *,
    run: Annotated[
        Path | None, typer.Argument(help="A run's directory: model, adapter, template and rows are its own.")
    ] = None,
    model: answers.Model = None,
    adapter: answers.Adapter = None,
    data: Data = None,
    checkpoint: answers.Checkpoint = None,
    backend: answers.Backend = None,
    device: answers.Device = None,
    template: answers.Template = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows.")] = None,
    generate: Generate = None,
    output: Output = None,
    json: JsonOption = False,
) -> None:
    """Measure a model on held-out rows: loss, perplexity and accuracy, and how good its answers are.

    Answers are compared with the expected ones: exact match, JSON that is valid and equal where JSON is expected,
    ROUGE and BLEU where finetune[metrics] is installed. Rows labelled undesirable are scored by themselves.

    With an adapter or a run, the base is measured beside it, on the same rows and without merging.

    \b
    Examples:
      ft evaluate outputs/mine
      ft evaluate outputs/mine --checkpoint best --data test.jsonl --json
      ft evaluate --model MODEL --adapter outputs/mine/adapter --data test.jsonl --limit 100
      ft evaluate --model demo --data examples/sample_dataset.json
      ft evaluate outputs/mine --data test.jsonl --generate 200 --output results.json
    """
    from finetune.workflows import evaluate as workflow
    from finetune.workflows.evaluation_file import check_output, document, write_results

    if output is not None:
        check_output(output)
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
    if output is not None:
        write_results(output, result)
        note(f"Written: {output}")
    if json:
        print_json(document(result))
    else:
        _show(result)


def _progress(which: str, done: int, rows: int) -> None:
    """One line that counts up, on a terminal only."""
    if sys.stderr.isatty():
        typer.echo(f"\r{which}: {done:,} of {rows:,} rows", err=True, nl=done == rows)


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
    rows += _answer_rows(result, both)
    if result.samples:
        rows.append(("seconds of generation", [f"{scores.generation_seconds:.1f}" for scores in both]))
    rows.append(("seconds of scoring", [f"{scores.seconds:.1f}" for scores in both]))
    return rows


def _answer_rows(result: "EvaluationResult", both: "list[Scores]") -> list[tuple[str, list[str]]]:
    """What was measured of the answers, and the loss of undesirable rows."""
    rows = []
    for key, label in _ANSWER_LABELS.items():
        values = [getattr(scores.figures, key) for scores in both]
        if None not in values:
            rows.append((label, [f"{value:.1f}" if key == "bleu" else f"{value:.1%}" for value in values]))
    if rows:
        judged = sum(sample.base_score is not None for sample in result.samples)
        rows[0] = (f"{rows[0][0]} ({judged} answers)", rows[0][1])
    undesirable = [scores.undesirable for scores in both if scores.undesirable is not None]
    if undesirable:
        rows.append((f"loss of undesirable rows ({undesirable[0].rows:,})", [f"{one.loss:.4f}" for one in undesirable]))
        rows.append(("perplexity of these", [f"{one.perplexity:,.3f}" for one in undesirable]))
        rows.append(("token accuracy of these", [f"{one.accuracy:.1%}" for one in undesirable]))
    return rows


def _short(text: str) -> str:
    """One line on the terminal, cut in the middle where it is long."""
    line = text.replace("\n", "⏎ ")
    half = LONGEST_SHOWN // 2
    return line if len(line) <= LONGEST_SHOWN else f"{line[:half]} … {line[-half:]}"

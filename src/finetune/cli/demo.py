"""`ft demo`: data, base model, training, tuned model and figures, told in order."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.workflows.demo import DemoResult
    from finetune.workflows.evaluate import EvaluationResult


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the run goes.")] = Path("outputs/demo"),
    backend: Annotated[answers.EngineName, typer.Option("--backend", help="The engine.")] = answers.EngineName.auto,
    json: JsonOption = False,
) -> None:
    """Tune the carried model on the carried data, and show what that changed. Needs no download.

    A small Llama learns to turn plain English into JSON tool calls; base and tuned model answer rows that neither
    training saw. A former demo in the same directory is replaced.

    \b
    Examples:
      ft demo
      ft demo --backend pytorch
      ft demo --output outputs/second --json
    """
    from rich.console import Console

    from finetune.tracking.console import ConsoleListener
    from finetune.workflows import demo as workflow

    began = time.perf_counter()
    workflow.require_room(output)
    console = Console(stderr=json, highlight=False, soft_wrap=True)
    with quiet_output(json):
        _heading(console, "The data", "a request in plain English, and the tool call that answers it")
        for row in workflow.demo_rows("train", workflow.SHOWN):
            _pair(console, row.request, [("call", row.call)])
        _heading(console, "The base model", "was never shown these tools")
        _show_base(console, workflow.base_answers(backend.value))
        _heading(console, "Training", "LoRA; Ctrl-C stops it, `ft train --resume` goes on")
        with ConsoleListener(stderr=json) as listener:
            result = workflow.tune_and_compare(
                output, backend=backend.value, began=began, listeners=[listener], on_notice=note
            )
        _heading(console, "The tuned model", "on rows that neither training saw")
        _show_answers(console, result.comparison, workflow.SHOWN)
        _show_figures(console, result)
        _show_next(console, output)
    if json:
        print_json(result.report)


def _heading(console: "Console", title: str, remark: str) -> None:
    from rich.text import Text

    console.print(Text.assemble("\n", (title, "bold cyan"), (f"  {remark}", "dim")))


def _pair(console: "Console", request: str, answers: list[tuple[str, str]]) -> None:
    from rich.text import Text

    console.print(Text(f"  {request}"))
    for label, answer in answers:
        style = {"base": "yellow", "tuned": "green"}.get(label, "dim")
        console.print(Text.assemble((f"    {label:<9}", "dim"), (answer.replace("\n", " "), style)))


def _show_base(console: "Console", result: "EvaluationResult") -> None:
    requests = _requests(len(result.samples))
    for request, sample in zip(requests, result.samples, strict=True):
        _pair(console, request, [("base", sample.base)])


def _show_answers(console: "Console", result: "EvaluationResult", shown: int) -> None:
    for request, sample in zip(_requests(shown), result.samples[:shown], strict=True):
        answers = [("expected", sample.expected), ("base", sample.base), ("tuned", sample.tuned or "")]
        _pair(console, request, answers)


def _requests(count: int) -> list[str]:
    from finetune.workflows.demo import demo_rows

    return [row.request for row in demo_rows("test", count)]


def _show_figures(console: "Console", result: "DemoResult") -> None:
    from rich.table import Table

    base, tuned = result.comparison.base, result.comparison.tuned
    if tuned is None or base.exact_match is None or tuned.exact_match is None:
        return
    table = Table(title=f"\n{result.comparison.rows} unseen rows", title_justify="left")
    for name in ("", "base", "tuned"):
        table.add_column(name)
    table.add_row("exact match", f"{base.exact_match:.1%}", f"{tuned.exact_match:.1%}")
    table.add_row("loss", f"{base.loss:.3f}", f"{tuned.loss:.3f}")
    table.add_row("token accuracy", f"{base.accuracy:.1%}", f"{tuned.accuracy:.1%}")
    console.print(table)
    console.print(f"{result.seconds:.0f} seconds in all, {result.run.training_time:.0f} of them training.")


def _show_next(console: "Console", output: Path) -> None:
    _heading(console, "What to do next", "")
    for command, what in (
        (f"ft chat {output}", "talk to the tuned model"),
        (f"ft evaluate {output}", "base and tuned model side by side"),
        (f"ft export {output} --format merged --output my-model", "one model without adapter"),
        ("ft dataset info YOUR.jsonl", "look at your own data"),
        ("ft train start MODEL YOUR.jsonl", "tune your own model"),
    ):
        console.print(f"  {command:<58} [dim]{what}[/dim]")
    console.print(f"  {output / 'report.html'!s:<58} [dim]open it in a browser: losses, samples, speed[/dim]")

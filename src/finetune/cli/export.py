"""`ft export`: a tuned model for other programs."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output


class Format(StrEnum):
    """Layouts of other programs."""

    peft = "peft"
    mlx = "mlx"
    merged = "merged"


def export(
    *,
    what: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, or an adapter's.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="PEFT or mlx-lm adapter, or one merged model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty directory.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base; default: the one that the run or the adapter names.")
    ] = None,
    checkpoint: answers.Checkpoint = None,
    json: JsonOption = False,
) -> None:
    """Write a tuned model for PEFT, mlx-lm, or as one merged model that anything loads.

    What was written is loaded again and compared with the original: where log-probabilities differ by more than
    rounding explains, the export fails and nothing is left behind.

    \b
    Examples:
      ft export outputs/mine --format merged --output my-model
      ft export outputs/mine --format mlx --output my-adapter --checkpoint best
      ft export path/to/adapter --model MODEL --format peft --output for-peft
    """
    from finetune.workflows import export as workflow

    with quiet_output(json):
        result = workflow.export(
            what, format=format.value, output=output, model=model, checkpoint=checkpoint, on_notice=note
        )
    if json:
        print_json(asdict(result))
        return
    comparison = result.comparison
    typer.echo(f"{result.output}: {', '.join(result.files)} ({result.size / 1e6:,.1f} MB)")
    typer.echo(
        f"Loaded again and compared on {comparison.tokens:,} tokens: log-probabilities differ by at most "
        f"{comparison.largest_difference:.1e} nats ({comparison.tolerance:.0e} allowed: {comparison.reason}); "
        f"the tuning changes them by up to {comparison.adapter_effect:.2g}."
    )

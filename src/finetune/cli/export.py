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
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of a run: best, last, or a step; of mlx-lm's files: a step.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option("--scale", help="What B A is multiplied by, for old mlx-lm files that do not say it."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge a quantised base into a model of floating point weights.")
    ] = False,
    backend: answers.Backend = None,
    json: JsonOption = False,
) -> None:
    """Write a tuned model for PEFT, mlx-lm, or as one merged model that anything loads.

    Adapters of either kind become adapters of either kind; mlx-lm's `.npz` files are read too. What was written is
    loaded again and compared with the original: where log-probabilities differ by more than rounding explains, or
    merging into quantised weights loses the tuning, the export fails and nothing is left behind.

    \b
    Examples:
      ft export outputs/mine --format merged --output my-model
      ft export outputs/mine --format mlx --output my-adapter --checkpoint best
      ft export path/to/adapter --model MODEL --format peft --output for-peft
      ft export mlx/adapters --checkpoint 100 --format peft --output for-peft
      ft export outputs/quantised-base --format merged --dequantize --output my-model
    """
    from finetune.export.card import difference
    from finetune.workflows import export as workflow

    with quiet_output(json):
        result = workflow.export(
            what,
            format=format.value,
            output=output,
            model=model,
            checkpoint=checkpoint,
            scale=scale,
            dequantize=dequantize,
            backend=backend,
            on_notice=note,
        )
    if json:
        print_json(asdict(result))
        return
    typer.echo(f"{result.output}: {', '.join(result.files)} ({result.size / 1e6:,.1f} MB)")
    if result.comparison is not None:
        typer.echo(
            f"Loaded again and compared on {result.comparison.tokens:,} tokens: {difference(result.comparison)}."
        )

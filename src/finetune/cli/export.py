"""`ft export`: a tuned model for other programs."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import JsonOption, note, print_json, quiet_output

if TYPE_CHECKING:
    from finetune.workflows.export import ExportResult


class Format(StrEnum):
    """Layouts of other programs."""

    peft = "peft"
    mlx = "mlx"
    merged = "merged"
    gguf = "gguf"
    gguf_lora = "gguf-lora"


What = Annotated[
    Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, or an adapter's; for gguf also a model.")
]
FormatOption = Annotated[
    Format,
    typer.Option("--format", "-f", help="PEFT, mlx-lm or GGUF adapter; or one merged model, as files or as GGUF."),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="A new or empty directory; for GGUF a file that ends in .gguf.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="The base; default: the one that the run or the adapter names.")
]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Of a run: best, last, or a step; of mlx-lm's files: a step.")
]
Scale = Annotated[
    float | None, typer.Option("--scale", help="What B A is multiplied by, for old mlx-lm files that do not say it.")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Merge a quantised base into a model of floating point weights.")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        "-q",
        help="Of gguf: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, ... (default: the base's); of mlx: 4bit or "
        "8bit, which writes the whole model.",
    ),
]


def export(
    *,
    what: What,
    format: FormatOption,
    output: Output,
    model: Model = None,
    checkpoint: Checkpoint = None,
    scale: Scale = None,
    dequantize: Dequantize = False,
    quantize: Quantize = None,
    backend: answers.Backend = None,
    json: JsonOption = False,
) -> None:
    """Write a tuned model for PEFT, mlx-lm, llama.cpp, or as one merged model that anything loads.

    Adapters of either kind become adapters of either kind; mlx-lm's `.npz` files are read too. What was written is
    loaded again and compared with the original: where log-probabilities differ by more than rounding explains, or
    merging into quantised weights loses the tuning, the export fails and nothing is left behind.

    \b
    Examples:
      ft export outputs/mine --format merged --output my-model
      ft export outputs/mine --format gguf --quantize q4_k_m --output my-model.gguf
      ft export outputs/mine --format gguf-lora --output my-adapter.gguf
      ft export outputs/mine --format mlx --output my-adapter --checkpoint best
      ft export outputs/mine --format mlx --quantize 4bit --output my-model-4bit
      ft export path/to/adapter --model MODEL --format peft --output for-peft
      ft export mlx/adapters --checkpoint 100 --format peft --output for-peft
      ft export outputs/quantised-base --format merged --dequantize --output my-model
    """
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
            quantize=quantize,
            backend=backend,
            on_notice=note,
        )
    if json:
        print_json(asdict(result))
    else:
        _show(result)


def _show(result: "ExportResult") -> None:
    from finetune.export.card import difference
    from finetune.export.formats import GGUF_FORMATS
    from finetune.export.ollama import next_steps

    typer.echo(f"{result.output}: {', '.join(result.files)} ({result.size / 1e6:,.1f} MB)")
    if result.comparison is not None:
        typer.echo(
            f"Loaded again and compared on {result.comparison.tokens:,} tokens: {difference(result.comparison)}."
        )
    if result.format in GGUF_FORMATS:
        for line in next_steps(str(result.output), is_adapter=result.format == "gguf-lora"):
            typer.echo(line)

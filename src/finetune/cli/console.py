"""What all commands share: one JSON document on standard output, errors on standard error, help from the schema."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

JSON = "--json"
JsonOption = Annotated[
    bool, typer.Option(JSON, help="Print one JSON document; everything else goes to standard error.")
]


def print_json(document: Any) -> None:
    """One JSON document on standard output. Numbers that JSON lacks (NaN, infinity) become null."""
    text = json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    typer.echo(text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def quiet_output(enabled: bool) -> Iterator[None]:
    """While a workflow runs under `--json`, whatever a library prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if enabled else contextlib.nullcontext():
        yield


def note(message: str) -> None:
    """A sentence for the person, on standard error."""
    typer.echo(message, err=True)


def option_help(key: str) -> str:
    """The help of a configuration option, from the schema: it is documented once."""
    from finetune.config.options import describe

    return f"{describe(key)}  ({key})"


def new_group(**settings: Any) -> typer.Typer:
    """A group of commands that looks like all others; without a command it shows its help."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, **settings)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, plain, so that they can be piped; an empty head is not printed."""
    lines = [*([head] if any(head) else []), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))] if lines else []
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def count(number: int | None) -> str:
    """A number of parameters as people say it: 260K, 1.1B."""
    if number is None:
        return "-"
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def size(number: float | None) -> str:
    """Bytes as people say them: 1.04 MB, 16.1 GB (powers of ten)."""
    if number is None:
        return "-"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g} bytes"

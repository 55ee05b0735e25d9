"""What all commands share: one JSON document on standard output, errors on standard error, help from the schema."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
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


def examples(*lines: str) -> str:
    """The end of a command's help: lines to copy."""
    return "Examples:\n\n" + "\n\n".join(f"    {line}" for line in lines)

"""`--show`: the rows that training leaves out or cuts, one by one."""

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from finetune.data.listing import RowListing

SHOWN = 50

ShowOption = Annotated[
    bool, typer.Option("--show", help="List each row that is dropped, left out or cut; with --json all of them.")
]


def rows_document(rows: "RowListing") -> dict[str, Any]:
    """All of them, for JSON."""
    return {"left_out": [{"file": row.origin.file, "line": row.origin.line, "reason": row.reason} for row in rows]}


def print_rows(rows: "RowListing") -> None:
    """The first ones, and how many more there are."""
    count = len(rows)
    typer.echo(f"\nRows that are dropped, left out or cut: {count:,}")
    for row in itertools.islice(rows, SHOWN):
        typer.echo(f"  {row}")
    if count > SHOWN:
        typer.echo(f"  and {count - SHOWN:,} more (--json lists all)")

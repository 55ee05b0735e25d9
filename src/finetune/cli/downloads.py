"""How `ft models pull` and `ft dataset pull` look."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from finetune.cli.console import size

if TYPE_CHECKING:
    from finetune.hub.client import Repository
    from finetune.workflows.pull import Pulled


@dataclass(frozen=True, slots=True)
class DownloadBar:
    """Progress of all files together."""

    progress: Any  # rich's
    task: Any

    def start(self, repository: "Repository") -> None:
        """What is missing is known now."""
        missing = repository.missing()
        text = f"{len(missing)} of {len(repository.files)} files"
        self.progress.update(self.task, description=text, total=sum(file.size for file in missing))

    def add(self, count: int) -> None:
        """Bytes have arrived."""
        self.progress.advance(self.task, count)


@contextlib.contextmanager
def download_bar() -> Iterator[DownloadBar]:
    """A bar on standard error; a pipe or a file gets nothing of it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield DownloadBar(progress, progress.add_task("Asking the hub", total=None))


def say_pulled(pulled: "Pulled") -> None:
    """What there is now, and where."""
    downloaded = f"{size(pulled.downloaded)} downloaded" if pulled.downloaded else "nothing to download"
    count = f"{len(pulled.files)} files" if len(pulled.files) > 1 else "1 file"
    typer.echo(f"{pulled.name} at commit {pulled.revision}: {count}, {size(pulled.bytes)}, {downloaded}.")
    typer.echo(f"Every file has the hash that the hub gives. It is in {pulled.path}")

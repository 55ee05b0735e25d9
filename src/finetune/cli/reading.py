"""How far the reading of large data is: a bar on a terminal, a line now and then elsewhere; on standard error."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.cli.console import note
from finetune.data.progress import Progress, watched

if TYPE_CHECKING:
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 15.0


class _Lines:
    """For pipes and files."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            share = "" if progress.share is None else f", {progress.share:.0%}"
            note(f"{progress.what}: {progress.rows:,} rows{share}")

    def close(self) -> None:
        """Nothing is held."""


class _Bar:
    """For terminals. It goes when the work is done."""

    def __init__(self) -> None:
        self._bar: Any = None  # rich's Progress, made when there is something to show
        self._task: TaskID | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.done:
            self.close()
            return
        if self._bar is None:
            self._bar = _make_bar()
            self._task = self._bar.add_task("", total=None, rows=0)
            self._bar.start()
        total, completed = (None, 0.0) if progress.share is None else (1.0, progress.share)
        self._bar.update(self._task, description=progress.what, rows=progress.rows, total=total, completed=completed)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True)


@contextlib.contextmanager
def reading_shown() -> Iterator[None]:
    """Show it while the block runs."""
    show = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        with watched(show):
            yield
    finally:
        show.close()

"""`training.log`: the run in sentences, each with its time."""

import contextlib
from datetime import datetime
from pathlib import Path

from finetune.core.events import Event, RunStarted
from finetune.tracking.lines import describe


class TextLog:
    """Appends a line for each event that says something to people."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._total_steps = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._total_steps = event.total_steps
        line = describe(event, self._total_steps)
        if line is not None:
            self._file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; a disk that is full was reported when it happened."""
        with contextlib.suppress(OSError):
            self._file.close()

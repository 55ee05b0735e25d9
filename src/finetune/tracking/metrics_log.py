"""`metrics.jsonl`: one event a line, in the order in which they happened."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from finetune.core.errors import FinetuneError
from finetune.core.events import CheckpointSaved, Event
from finetune.core.files import write_atomically

AT_EVALUATION = frozenset({"eval", "sample"})


class MetricsLog:
    """Appends events to the file and flushes each, so that whoever reads it sees the run as it goes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def __call__(self, event: Event) -> None:
        self._file.write(to_line(event.record()).encode())
        self._file.flush()
        if isinstance(event, CheckpointSaved):
            # The log must not be behind the checkpoint that a power cut leaves.
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left and close the file; a disk that is full was reported when it happened."""
        with contextlib.suppress(OSError):
            self._file.close()


def to_line(record: dict[str, Any]) -> str:
    """A record as one line of strict JSON: a number that is not finite becomes null."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def to_text(record: dict[str, Any]) -> str:
    """A record as strict JSON for people to read: indented, in its own letters."""
    return json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The value with each NaN and infinity in it replaced by None: JSON has no word for them."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records of a log. A last line that was torn is left out; an absent file is an empty log.

    Raises FinetuneError for another line that is not a record: somebody changed the file.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "event" not in record:
                raise ValueError("not an event")
            records.append(record)
        except ValueError as error:
            # What follows the last line end is either nothing or torn.
            if number < len(lines):
                raise FinetuneError(f"{path}:{number} is not an event of a run: {error}.") from error
    return records


def cut_after(path: Path, *, step: int, evaluated_step: int) -> None:
    """Take out what happened after a checkpoint, so that each step stands once when the run goes on from it.

    `evaluated_step` is the checkpoint's last complete evaluation: -1 for none.
    """
    kept = [record for record in read_events(path) if _happened(record, step, evaluated_step)]
    write_atomically(path, "".join(to_line(record) for record in kept))


def _happened(record: dict[str, Any], step: int, evaluated_step: int) -> bool:
    last = evaluated_step if record["event"] in AT_EVALUATION else step
    return "step" not in record or int(record["step"]) <= last

"""Which rows are not trained on as they are, each with its reason: what the counts of a report stand for."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.columns import release, windows
from finetune.data.fates import Fate, RowFates
from finetune.data.loaded import LoadedFile
from finetune.data.rows import Origin

_REASONS = {
    Fate.UNDESIRABLE: "labelled undesirable: left out",
    Fate.LEFT_OUT: "left out by the weight of its file",
}


@dataclass(frozen=True, slots=True)
class ListedRow:
    """A row that is dropped, left out or cut, and why."""

    origin: Origin
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class RowListing:
    """All such rows, in the order of the files. They are worded when they are asked for."""

    def __init__(self, parts: Sequence[RowFates]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part.loaded.problems) + len(part.of_rows) - part.number(Fate.KEPT) for part in self._parts)

    def __iter__(self) -> Iterator[ListedRow]:
        for part in self._parts:
            for file, start in zip(part.loaded.files, part.loaded.starts.tolist(), strict=False):
                bad = (ListedRow(problem.origin, problem.reason) for problem in file.problems)
                yield from heapq.merge(bad, _of_file(part, file, start), key=lambda row: row.origin.line)


def _of_file(part: RowFates, file: LoadedFile, start: int) -> Iterator[ListedRow]:
    for window in windows(len(file.store)):
        fates = part.of_rows[start + window.start : start + window.stop].copy()
        release(part.of_rows)
        for place in (window.start + np.flatnonzero(fates)).tolist():
            reason = _reason(part, file, place, start + place, Fate(fates[place - window.start]))
            yield ListedRow(file.origin(place), reason)


def _reason(part: RowFates, file: LoadedFile, place: int, position: int, fate: Fate) -> str:
    length = f"{file.store.record(place)['length']:,} tokens, more than {part.max_length:,}"
    match fate:
        case Fate.DUPLICATE:
            return f"an exact duplicate of {part.first_like(position)}"
        case Fate.REFUSED:
            return file.refused[place]
        case Fate.CUT:
            return f"cut: {length}"
        case Fate.TOO_LONG:
            return f"dropped: {length}"
        case Fate.UNTRAINED:
            return f"dropped: no trained token within {part.max_length:,}"
        case _:
            return _REASONS[fate]

"""Which rows are not trained on as they are, each with its reason: what the counts of a report stand for."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.groups import group
from finetune.data.loaded import LoadedFile
from finetune.data.rows import Origin
from finetune.data.selection import Fate, RowFates

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
        return sum(len(part.loaded.problems) + int((part.of_rows != Fate.KEPT).sum()) for part in self._parts)

    def __iter__(self) -> Iterator[ListedRow]:
        for part in self._parts:
            copied = _copied(part)
            for file, start in zip(part.loaded.files, part.loaded.starts.tolist(), strict=False):
                bad = (ListedRow(problem.origin, problem.reason) for problem in file.problems)
                yield from heapq.merge(bad, _of_file(part, file, start, copied), key=lambda row: row.origin.line)


def _copied(part: RowFates) -> dict[int, int]:
    """For each further copy, the position of the first."""
    copies = np.flatnonzero(part.of_rows == Fate.DUPLICATE)
    if not len(copies):
        return {}
    groups = group(part.loaded.column("row"))
    return dict(zip(copies.tolist(), groups.first[groups.of_row[copies]].tolist(), strict=True))


def _of_file(part: RowFates, file: LoadedFile, start: int, copied: dict[int, int]) -> Iterator[ListedRow]:
    fates = part.of_rows[start : start + len(file.store)]
    for place in np.flatnonzero(fates).tolist():
        yield ListedRow(file.origin(place), _reason(part, file, place, Fate(fates[place]), copied.get(start + place)))


def _reason(part: RowFates, file: LoadedFile, place: int, fate: Fate, first: int | None) -> str:
    length = f"{file.store.table[place]['length']:,} tokens, more than {part.max_length:,}"
    match fate:
        case Fate.DUPLICATE:
            return f"an exact duplicate of {part.loaded.origin(first or 0)}"
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

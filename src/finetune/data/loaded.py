"""What became of data files once they are read: tables of usable rows, and the bad ones by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.columns import Positions, windows
from finetune.data.formats import Shape
from finetune.data.groups import Keyed, keyed
from finetune.data.partition import Records
from finetune.data.readers import SourceFile
from finetune.data.report import FileReport
from finetune.data.rows import Origin, Problem
from finetune.data.token_store import IS_DIALOGUE, IS_TEXT, ROW, Table, TokenStore


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """One file's usable rows and its bad ones, before any rate is applied."""

    source: SourceFile
    shape: Shape
    rows: int  # bad ones too
    store: TokenStore
    problems: tuple[Problem, ...]  # rows that cannot be used, without the template's
    refused: Mapping[int, str]  # place in the table to the template's reason
    weight: float

    def origin(self, place: int) -> Origin:
        """Where a row of the table stands."""
        return Origin(self.source.path.name, int(self.store.record(place)["line"]))

    def report(self) -> FileReport:
        """What there is to say about the file."""
        return FileReport(
            path=str(self.source.path),
            format=self.source.format,
            encoding=self.source.encoding,
            shape=self.shape.description,
            sha256=self.source.sha256,
            rows=self.rows,
            bad_rows=len(self.problems),
            unused_columns=self.shape.unused_columns,
        )


class LoadedData:
    """The usable rows of all files, in order. A position counts them from 0 over all files."""

    def __init__(self, files: Sequence[LoadedFile]) -> None:
        self.files = tuple(files)
        self.starts = np.cumsum([0, *(len(file.store) for file in files)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def rows(self) -> int:
        """Rows that were read, bad ones too."""
        return sum(file.rows for file in self.files)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Rows that cannot be used, without those that only the template refuses."""
        return tuple(problem for file in self.files for problem in file.problems)

    @property
    def names(self) -> str:
        """The files, for messages."""
        return ", ".join(str(file.source.path) for file in self.files)

    def records(self, positions: Positions) -> Table:
        """The records of rows at ascending positions."""
        parts = [file.store.records(places) for file, places in self.by_file(positions)]
        return np.concatenate(parts) if parts else np.empty(0, ROW)

    def by_file(self, positions: Positions) -> Iterator[tuple[LoadedFile, Positions]]:
        """Ascending positions as places in the tables of their files."""
        ends = np.searchsorted(positions, self.starts)
        for file, start, (first, end) in zip(self.files, self.starts.tolist(), pairwise(ends.tolist()), strict=False):
            if end > first:
                yield file, positions[first:end] - start

    def windows(self) -> Iterator[tuple[int, Table]]:
        """The records of all rows in pieces, each with the position of its first."""
        for window in windows(len(self)):
            yield window.start, self.records(np.arange(window.start, window.stop))

    def by_digest(self, name: str) -> Keyed:
        """All rows by a digest: `row` or `prompt`."""

        def pieces() -> Iterator[Records]:
            for start, records in self.windows():
                yield keyed(np.arange(start, start + len(records)), records[name], records["label"])

        return Keyed(pieces, len(self))

    def place(self, position: int) -> tuple[LoadedFile, int]:
        """The file of a row, and its place in that file's table."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.files[number], int(position - self.starts[number])

    def origin(self, position: int) -> Origin:
        """Where a row stands."""
        file, place = self.place(position)
        return file.origin(place)

    def refusals(self) -> list[tuple[int, Problem]]:
        """Positions of the rows that the template refuses, with the reason."""
        return [
            (int(start) + place, Problem(file.origin(place), reason))
            for file, start in zip(self.files, self.starts, strict=False)
            for place, reason in file.refused.items()
        ]

    def kinds(self) -> "RowKinds":
        """What is among the rows."""
        return RowKinds.of(records["flags"] for _, records in self.windows())


@dataclass(frozen=True, slots=True)
class RowKinds:
    """Whether there are conversations among rows, and among those some that are more than a request and its answer."""

    conversations: bool
    dialogues: bool

    @classmethod
    def of(cls, flags: Iterable[npt.NDArray[Any]]) -> "RowKinds":
        """`flags` are those of the rows, in pieces."""
        found = [(bool((part & IS_TEXT == 0).any()), bool((part & IS_DIALOGUE).any())) for part in flags]
        return cls(any(conversations for conversations, _ in found), any(dialogues for _, dialogues in found))

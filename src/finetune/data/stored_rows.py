"""Rows by number, read from where they are stored when they are asked for."""

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from finetune.core.types import BoolArray, IntArray
from finetune.data.columns import TEXTS, Positions, release, stored, windows
from finetune.data.groups import Keyed, keyed
from finetune.data.loaded import LoadedData
from finetune.data.partition import Records
from finetune.data.rows import EncodedRow

_READS = 64  # rows between which the memory of their positions is given back: 64 KB each, as the system maps files
_READ = 2**14  # tokens that are read at once


class StoredRows(Sequence[EncodedRow]):
    """Some rows of the data, by their positions, cut to `max_length` tokens. A row may occur several times."""

    def __init__(self, loaded: LoadedData, positions: Positions, max_length: int) -> None:
        self.positions = positions
        self.loaded = loaded
        self.max_length = max_length
        self._reads = 0
        self._lengths_kept: IntArray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...
    def __getitem__(self, index: int | slice) -> "EncodedRow | StoredRows":
        if isinstance(index, slice):
            return StoredRows(self.loaded, self.positions[index], self.max_length)
        file, place = self.loaded.place(int(self.positions[index]))
        self._reads += 1
        if self._reads % _READS == 0:
            release(self.positions)
        return file.store.row(place, self.max_length, file.source.path.name)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row [rows], without reading it."""
        if self._lengths_kept is None:
            cut = (np.minimum(whole, self.max_length) for _, whole in self._lengths())
            self._lengths_kept = stored(cut, np.int32)
        return self._lengths_kept

    def tokens(self) -> Iterator[tuple[IntArray, BoolArray]]:
        """Ids and masks of all rows in turn, cut. Raises DamagedStoreError."""
        for window in windows(len(self), TEXTS):
            for file, places in self.loaded.by_file(self.positions[window]):
                records = file.store.records(places)
                for near in np.split(records, np.flatnonzero(np.diff(records["start"] // _READ)) + 1):
                    for ids, mask in file.store.tokens(near, file.source.path.name):
                        yield ids[: self.max_length], mask[: self.max_length]
            release(self.positions)

    def by_request(self) -> Keyed:
        """The rows by what they ask."""
        return Keyed(self.requests, len(self))

    def requests(self, first: int = 0) -> Iterator[Records]:
        """The digest of each row's request, in windows; the rows are numbered from `first`."""
        for window in windows(len(self)):
            records = self.loaded.records(self.positions[window])
            yield keyed(np.arange(first + window.start, first + window.stop), records["prompt"], records["label"])
            release(self.positions)

    def first_whole(self, limit: int | None) -> list[int]:
        """Numbers of the first rows that are not cut; None: of all."""
        whole = (
            number
            for window, lengths in self._lengths()
            for number in (window.start + np.flatnonzero(lengths <= self.max_length)).tolist()
        )
        return list(itertools.islice(whole, limit))

    def _lengths(self) -> Iterator[tuple[slice, IntArray]]:
        """Before any cut."""
        for window in windows(len(self)):
            yield window, self.loaded.records(self.positions[window])["length"].astype(np.int32)
            release(self.positions)


def spread(rows: StoredRows, most: int | None) -> StoredRows:
    """At most so many rows, at even distances; None: all."""
    if most is None or len(rows) <= most:
        return rows
    return StoredRows(rows.loaded, rows.positions[np.arange(most) * len(rows) // most], rows.max_length)


def lengths_of(rows: Sequence[EncodedRow]) -> IntArray:
    """Tokens of each row [rows]."""
    if isinstance(rows, StoredRows):
        return rows.lengths
    return np.fromiter(map(len, rows), np.int32, len(rows))


def longest_of(rows: Sequence[EncodedRow]) -> int:
    """Tokens of the longest row."""
    return max(int(lengths_of(rows[window]).max()) for window in windows(len(rows)))

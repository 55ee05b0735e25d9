"""Rows by number, read from where they are stored when they are asked for."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from finetune.core.types import IntArray
from finetune.data.groups import Positions
from finetune.data.loaded import LoadedData
from finetune.data.rows import EncodedRow


class StoredRows(Sequence[EncodedRow]):
    """Some rows of the data, by their positions, cut to `max_length` tokens. A row may occur several times."""

    def __init__(self, loaded: LoadedData, positions: Positions, max_length: int) -> None:
        self.positions = positions
        self._loaded = loaded
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...
    def __getitem__(self, index: int | slice) -> "EncodedRow | StoredRows":
        if isinstance(index, slice):
            return StoredRows(self._loaded, self.positions[index], self._max_length)
        file, place = self._loaded.place(int(self.positions[index]))
        return file.store.row(place, self._max_length, file.origin(place))

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row [rows], without reading it."""
        lengths = self._loaded.column("length")[self.positions]
        shown: IntArray = np.minimum(lengths, self._max_length).astype(np.int32)
        return shown

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """Which rows are not cut [rows]."""
        return self._loaded.column("length")[self.positions] <= self._max_length


def lengths_of(rows: Sequence[EncodedRow]) -> IntArray:
    """Tokens of each row [rows]."""
    if isinstance(rows, StoredRows):
        return rows.lengths
    return np.fromiter(map(len, rows), np.int32, len(rows))

"""Encoded rows of one file as arrays: a table with one record a row, and the token ids and masks end to end.

In memory for small data; for large data in files, from which rows are read when they are needed, so that memory does
not grow with their number.
"""

import os
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.core.errors import DataError
from finetune.core.types import BoolArray, IntArray
from finetune.data.columns import WINDOW
from finetune.data.rows import EncodedRow, Origin

Table: TypeAlias = npt.NDArray[np.void]
TokenArray: TypeAlias = npt.NDArray[np.uint16 | np.int32]

# One record a usable row. Tokens are counted before any cut.
ROW = np.dtype(
    [
        ("start", "<i8"),  # place of the first token among those of the file
        ("length", "<u4"),  # tokens; 0 where the template refuses the row, or nothing was encoded
        ("trained", "<u4"),  # trained tokens
        ("trained_from", "<i4"),  # the first trained token; -1: there is none
        ("checksum", "<u4"),  # CRC-32 of the row's ids and mask
        ("number", "<u4"),  # of the row among all rows of the file, bad ones too, from 0
        ("line", "<u4"),
        ("characters", "<u4"),
        ("label", "i1"),  # 1 desirable, 0 undesirable, -1 without a label
        ("flags", "u1"),
        ("unseen", "u1"),  # bit r: the template leaves out ROLES[r]
        ("row", "<u8", (2,)),  # the beginning of `checks.row_key`
        ("prompt", "<u8", (4,)),  # `checks.prompt_key`
    ]
)
IS_TEXT, IS_DIALOGUE, IS_REFUSED = 1, 2, 4  # flags
ROLES = ("system", "user", "assistant", "tool")

TABLE_FILE, IDS_FILE, MASK_FILE = "rows.bin", "ids.bin", "mask.bin"
FILES_OF_ENTRY = 3  # which stay open while its rows are used


class DamagedStoreError(DataError):
    """Stored rows are not what was written. `store` is the name of their directory."""

    def __init__(self, directory: Path, origin: Origin) -> None:
        self.store = directory.name
        super().__init__(f"{directory}: the tokens of {origin} are damaged. Delete that directory and start again.")


class Stored(Protocol):
    """An array that is read in pieces: in memory, or in a file."""

    def __len__(self) -> int: ...
    def __getitem__(self, piece: slice, /) -> npt.NDArray[Any]: ...


class TokenStore:
    """The rows of one file. `directory` is where they are; in memory they have none."""

    def __init__(self, table: Stored, ids: Stored, mask: Stored, directory: Path = Path()) -> None:
        self._table = table
        self._ids = ids
        self._mask = mask
        self._directory = directory

    def __len__(self) -> int:
        return len(self._table)

    def record(self, place: int) -> np.void:
        """One record of the table."""
        found: np.void = self._table[place : place + 1][0]
        return found

    def records(self, places: npt.NDArray[Any]) -> Table:
        """The records at these ascending places of the table."""
        parts = np.split(places, np.flatnonzero(np.diff(places // WINDOW)) + 1)
        found = [self._near(part) for part in parts if len(part)]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, ROW), *found])

    def _near(self, places: npt.NDArray[Any]) -> Table:
        first, last = int(places[0]), int(places[-1])
        read = self._table[first : last + 1]
        if len(read) == len(places) and np.array_equal(places, np.arange(first, last + 1)):
            return read
        found: Table = read[places - first]
        return found

    def tokens(self, records: Table, file: str) -> Iterator[tuple[IntArray, BoolArray]]:
        """Ids and masks of rows, uncut. What lies between them is read too: they are near each other.

        Raises DamagedStoreError where bytes have changed; `file` is where the rows came from.
        """
        starts, ends = records["start"], records["start"] + records["length"]
        first, end = int(starts.min()), int(ends.max())
        ids, masks = self._ids[first:end], self._mask[first:end]
        wide = ids.astype(np.int32)
        places = zip((starts - first).tolist(), (ends - first).tolist(), records["checksum"].tolist(), strict=True)
        for number, (start, stop, stored) in enumerate(places):
            mask = masks[start:stop]
            if checksum(ids[start:stop], mask) != stored:
                raise DamagedStoreError(self._directory, Origin(file, int(records["line"][number])))
            yield wide[start:stop], mask

    def row(self, place: int, max_length: int, file: str) -> EncodedRow:
        """A row, cut to `max_length` tokens. Raises DamagedStoreError."""
        records = self._table[place : place + 1]
        [(ids, mask)] = self.tokens(records, file)
        keep = min(len(ids), max_length)
        origin = Origin(file, int(records["line"][0]))
        return EncodedRow(ids[:keep], mask[:keep].copy(), origin, truncated=keep < len(ids))


def checksum(ids: TokenArray, mask: BoolArray) -> int:
    """CRC-32 of a row as it is stored."""
    return zlib.crc32(mask.data, zlib.crc32(ids.data))


def token_type(largest_id: int) -> type[np.uint16] | type[np.int32]:
    """The smallest type that holds every id."""
    return np.uint16 if largest_id < 2**16 else np.int32


class StoredFile:
    """A file as an array that is read piece by piece. It stays readable when its name is taken away.

    It is not mapped: around each row that is looked at, the system would map 64 KB into the process.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._dtype = np.dtype(dtype)
        self._length = path.stat().st_size // self._dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, piece: slice) -> npt.NDArray[Any]:
        start, stop, _ = piece.indices(self._length)
        size = self._dtype.itemsize
        return np.frombuffer(os.pread(self._descriptor, (stop - start) * size, start * size), self._dtype)


def open_store(directory: Path, ids_type: npt.DTypeLike) -> TokenStore:
    """The rows that a DirectoryWriter wrote."""
    return TokenStore(
        StoredFile(directory / TABLE_FILE, ROW),
        StoredFile(directory / IDS_FILE, ids_type),
        StoredFile(directory / MASK_FILE, np.bool_),
        directory,
    )


class StoreWriter(Protocol):
    """Takes the rows of a file, part by part."""

    def add(self, table: Table, ids: TokenArray, mask: BoolArray) -> None:
        """Append rows; their `start` counts from the first token of this part."""
        ...


@dataclass(slots=True)
class _Tokens:
    """How many tokens there are so far."""

    count: int = 0

    def placed(self, table: Table, added: int) -> Table:
        """The records with their places among all tokens."""
        table["start"] += self.count
        self.count += added
        return table


class MemoryWriter:
    """Keeps the rows in memory."""

    def __init__(self) -> None:
        self._parts: list[tuple[Table, TokenArray, BoolArray]] = []
        self._tokens = _Tokens()

    def add(self, table: Table, ids: TokenArray, mask: BoolArray) -> None:
        self._parts.append((self._tokens.placed(table, len(ids)), ids, mask))

    def finish(self) -> TokenStore:
        """The rows that were added."""
        if not self._parts:
            return TokenStore(np.empty(0, ROW), np.empty(0, np.int32), np.empty(0, np.bool_))
        tables, ids, masks = zip(*self._parts, strict=True)
        return TokenStore(np.concatenate(tables), np.concatenate(ids), np.concatenate(masks))


class DirectoryWriter:
    """Writes the rows into the files of a directory."""

    def __init__(self, directory: Path) -> None:
        self._files = [(directory / name).open("wb") for name in (TABLE_FILE, IDS_FILE, MASK_FILE)]
        self._tokens = _Tokens()

    def add(self, table: Table, ids: TokenArray, mask: BoolArray) -> None:
        for file, part in zip(self._files, (self._tokens.placed(table, len(ids)), ids, mask), strict=True):
            file.write(np.ascontiguousarray(part).data if len(part) else b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hand everything to the operating system."""
        for file in self._files:
            file.close()

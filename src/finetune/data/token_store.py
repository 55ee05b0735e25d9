"""Encoded rows of one file as arrays: a table with one record a row, and the token ids and masks end to end.

In memory for small files; for large ones in files that are mapped, so that rows are read from the disk when they are
needed, and memory does not grow with their number.
"""

import mmap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.core.errors import DataError
from finetune.core.types import BoolArray
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
_AT_ONCE = 2**16  # records of a column
_HELD = 4 * 2**20  # bytes read of mapped files before their pages are given back


class DamagedStoreError(DataError):
    """Stored rows are not what was written. `store` is the name of their directory."""

    def __init__(self, directory: Path, origin: Origin) -> None:
        self.store = directory.name
        super().__init__(f"{directory}: the tokens of {origin} are damaged. Delete that directory and start again.")


class TokenStore:
    """The rows of one file. `directory` is where they are; in memory they have none."""

    def __init__(
        self,
        table: Table,
        ids: TokenArray,
        mask: BoolArray,
        mapped: Sequence["MappedFile"] = (),
        directory: Path = Path(),
    ) -> None:
        self.table = table
        self._ids = ids
        self._mask = mask
        self._mapped = mapped
        self._directory = directory
        self._read = 0

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int, max_length: int, origin: Origin) -> EncodedRow:
        """A row, cut to `max_length` tokens. Raises DamagedStoreError where its bytes have changed."""
        record = self.table[index]
        start, length = int(record["start"]), int(record["length"])
        ids, mask = self._ids[start : start + length], self._mask[start : start + length]
        if checksum(ids, mask) != record["checksum"]:
            raise DamagedStoreError(self._directory, origin)
        keep = min(length, max_length)
        row = EncodedRow(ids[:keep].astype(np.int32), mask[:keep].copy(), origin, truncated=keep < length)
        self._account(length * (ids.itemsize + 1) + ROW.itemsize)
        return row

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column of the table, in memory."""
        column = self.table[name]
        values = np.empty(column.shape, column.dtype)
        for start in range(0, len(values), _AT_ONCE):
            values[start : start + _AT_ONCE] = column[start : start + _AT_ONCE]
            self.release()
        return values

    def release(self) -> None:
        """Give back the memory of what was read of mapped files; it stays in the system's cache as long as it likes."""
        self._read = 0
        for file in self._mapped:
            file.release()

    def _account(self, size: int) -> None:
        self._read += size
        if self._read > _HELD:
            self.release()


def checksum(ids: TokenArray, mask: BoolArray) -> int:
    """CRC-32 of a row as it is stored."""
    return zlib.crc32(mask.tobytes(), zlib.crc32(ids.tobytes()))


def token_type(largest_id: int) -> type[np.uint16] | type[np.int32]:
    """The smallest type that holds every id."""
    return np.uint16 if largest_id < 2**16 else np.int32


class MappedFile:
    """A file's bytes as a read-only array."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            empty = not path.stat().st_size
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dtype: Any) -> npt.NDArray[Any]:
        """All of it."""
        return np.empty(0, dtype) if self._map is None else np.frombuffer(self._map, dtype)

    def release(self) -> None:
        """Drop its pages from this process."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def open_store(directory: Path, ids_type: Any) -> TokenStore:
    """The rows that a DirectoryWriter wrote."""
    files = [MappedFile(directory / name) for name in (TABLE_FILE, IDS_FILE, MASK_FILE)]
    table, ids, mask = (file.array(dtype) for file, dtype in zip(files, (ROW, ids_type, np.bool_), strict=True))
    return TokenStore(table, ids, mask, files, directory)


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

    def close(self) -> None:
        """Hand everything to the operating system."""
        for file in self._files:
            file.close()

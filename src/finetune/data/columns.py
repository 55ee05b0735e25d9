"""Arrays with an element for each row: in memory while they are small, and beyond that in files without a name.

A mapped file's pages are the system's, which takes them back when it needs room, and `release` gives them back at once.
So the memory of a process does not grow with the rows, and code is the same for eight of them and for a million.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.core.errors import DataError
from finetune.core.machine import tidied
from finetune.core.paths import cache_directory
from finetune.core.types import BoolArray

Positions: TypeAlias = npt.NDArray[np.int64]

WINDOW = 2_048  # rows that are worked on at once
TEXTS = 500  # rows whose texts are held at once
_IN_MEMORY = 2**17  # bytes
_SCATTERED = 256  # elements that may each be on a page of their own: 1 MB


def row_array(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros [count]. Raises DataError where the disk has no room for them."""
    size = count * np.dtype(dtype).itemsize
    if size <= _IN_MEMORY:
        return np.zeros(count, dtype)
    return np.frombuffer(_reserved(size), dtype)


def stored(pieces: Iterable[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """All pieces, one behind the other, to be read. Raises DataError where the disk has no room for them."""
    coming = iter(pieces)
    small = list(_until_large(coming))
    more = next(coming, None)
    if more is None:
        return np.concatenate([np.empty(0, dtype), *small])
    with _nameless() as file:
        for piece in chain(small, [more], coming):
            file.write(np.ascontiguousarray(piece, dtype).view(np.uint8).data)
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _until_large(pieces: Iterator[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    size = 0
    while size <= _IN_MEMORY and (piece := next(pieces, None)) is not None:
        size += piece.nbytes
        yield piece


def release(*arrays: npt.NDArray[Any]) -> None:
    """Give back the memory of arrays that are mapped; their values stay."""
    for array in arrays:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.obj.madvise(mmap.MADV_DONTNEED)


def windows(count: int, size: int | None = None) -> Iterator[slice]:
    """The rows 0 to `count` in pieces of `size`; None: WINDOW."""
    size = size or WINDOW
    return tidied(slice(start, min(start + size, count)) for start in range(0, count, size))


def pieces_of(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """All of an array in windows."""
    for window in windows(len(array)):
        yield array[window]
        release(array)


def where(array: npt.NDArray[Any], test: Callable[[npt.NDArray[Any]], BoolArray]) -> Positions:
    """The rows, ascending, for which `test` of their elements is true."""
    parts = zip(windows(len(array)), pieces_of(array), strict=True)
    return stored((np.flatnonzero(test(part)) + window.start for window, part in parts), np.int64)


def put(array: npt.NDArray[Any], places: Positions, values: npt.NDArray[Any]) -> None:
    """`array[places] = values`, with little of a mapped array in memory at once wherever the places are."""
    for start in range(0, len(places), _SCATTERED):
        some = slice(start, start + _SCATTERED)
        array[places[some]] = values[some]
        release(array)


def at(values: Positions, numbers: Positions) -> Positions:
    """`values[numbers]`."""
    return stored((_picked(values, part) for part in pieces_of(numbers)), np.int64)


def _picked(values: Positions, numbers: Positions) -> Positions:
    found = values[numbers]
    release(values)
    return found


def shuffled(count: int, generator: np.random.Generator) -> npt.NDArray[np.int32 | np.int64]:
    """What `generator.permutation(count)` gives."""
    order = row_array(count, np.int32 if count < 2**31 else np.int64)
    for window in windows(count):
        order[window] = np.arange(window.start, window.stop)
    generator.shuffle(order)
    release(order)
    return order


def _reserved(size: int) -> mmap.mmap:
    """A new file of so many bytes."""
    with _nameless() as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, and not a signal later
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size)


@contextlib.contextmanager
def _nameless() -> Iterator[IO[bytes]]:
    folder = _folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{folder or tempfile.gettempdir()}: the account of the rows cannot be kept there "
            f"({error.strerror or error}). Make room, or name a directory with room in FT_CACHE_DIR."
        ) from error


def _folder() -> Path | None:
    """The cache, which is on a disk; None, the system's directory, where it cannot be written."""
    folder = cache_directory()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None

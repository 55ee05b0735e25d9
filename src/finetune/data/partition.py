"""Records on disk in parts that fit into memory, by the first bits of their key: equal keys meet in one part."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.core.machine import tidied
from finetune.data.columns import put, release, row_array

Records: TypeAlias = npt.NDArray[np.void]

_PART = 2**16  # bytes
_MOST_PARTS = 2**14


class Partition:
    """Iterate to get its parts, of some _PART bytes each, in the order of their keys.

    A part keeps the order in which its records came. Its size rests on keys that are evenly spread, as hashes are, and
    different: records with one and the same key are in memory together.
    """

    def __init__(self, windows: Callable[[], Iterable[Records]], count: int, dtype: npt.DTypeLike) -> None:
        """`windows` gives all `count` records, twice. Their first field, `key`, is [words] of uint64."""
        self._records = row_array(count, dtype)
        self._sizes = np.zeros(min(_MOST_PARTS, self._records.nbytes // _PART + 1), np.int64)
        for window in windows():
            self._sizes += self._counts(self._parts_of(window))
        free = np.cumsum(self._sizes) - self._sizes
        for window in windows():
            self._place(window, free)

    def __iter__(self) -> Iterator[Records]:
        end = 0
        for size in tidied(self._sizes.tolist()):
            yield self._records[end : end + size]
            end += size
            release(self._records)

    def _parts_of(self, window: Records) -> npt.NDArray[np.int64]:
        first_bits = window["key"][:, 0] >> np.uint64(32)
        return (first_bits * np.uint64(len(self._sizes)) >> np.uint64(32)).astype(np.int64)

    def _counts(self, parts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.bincount(parts, minlength=len(self._sizes))

    def _place(self, window: Records, free: npt.NDArray[Any]) -> None:
        """Put records at the next free places of their parts."""
        parts = self._parts_of(window)
        order, counts = np.argsort(parts, kind="stable"), self._counts(parts)
        within = np.arange(len(window)) - np.repeat(np.cumsum(counts) - counts, counts)
        put(self._records, free[parts[order]] + within, window[order])
        free += counts

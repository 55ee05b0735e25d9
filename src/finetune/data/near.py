"""Texts that are almost the same, found without comparing each with each.

A text is the set of its runs of three words. MinHash (Broder 1997) keeps the least value of each of 64 hash functions
over that set: two texts share one of them with the probability of their Jaccard similarity |A and B| / |A or B|.
Texts that agree in all four values of one of 16 bands are compared exactly: of pairs with a similarity of 0.8 that
finds 99.98 %.
"""

import hashlib
import itertools
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from finetune.data.columns import WINDOW, Positions, pieces_of, release, row_array, stored, windows
from finetune.data.partition import Partition, Records

Hashes = npt.NDArray[np.uint64]

SIMILARITY = 0.8
_RUN = 3  # words
_BANDS, _VALUES = 16, 4
_READS = 64  # of arrays on the disk at places anywhere, before their memory is given back
# A text: where its hashes are in the file, how many, and a number for each band; and a band by its number.
_SIGNED = np.dtype([("start", "<i8"), ("count", "<u4"), ("bands", "<u8", (_BANDS,))])
_BAND = np.dtype([("key", "<u8", (1,)), ("position", "<i8")])
_PRIME = np.uint64(4_294_967_311)  # the first above 2^32
_DRAWN = np.random.default_rng(0).integers(1, 2**31, size=(2, _BANDS * _VALUES)).astype(np.uint64)


def near_groups(texts: Iterable[str]) -> Iterator[Positions]:
    """Positions of texts that are at least SIMILARITY to another of their group, in the order of their first ones.

    Texts without a word are left out. What is kept of a text is on the disk: its words' hashes, and 150 bytes.
    """
    with tempfile.TemporaryFile() as file:
        runs = _Runs(file, stored(_signed(texts, file), _SIGNED))
        found = _Groups(len(runs))
        for first, second in _candidates(runs.by_band()):
            if not found.together(first, second) and _jaccard(runs[first], runs[second]) >= SIMILARITY:
                found.join(first, second)
    yield from found.of_several()


def _signed(texts: Iterable[str], file: IO[bytes]) -> Iterator[Records]:
    """A record of each text, in pieces; its hashes go to the file."""
    start, coming = 0, iter(texts)
    while some := list(itertools.islice(coming, WINDOW)):
        records = np.zeros(len(some), _SIGNED)
        for record, text in zip(records, some, strict=True):
            hashes = _runs(text)
            file.write(hashes.astype(np.uint32).tobytes())
            record["start"], record["count"] = start, len(hashes)
            start += len(hashes)
            if len(hashes):
                record["bands"] = _bands(hashes)
        yield records
    file.flush()


class _Runs:
    """The hashes of each text, read from the file, and the numbers of its bands."""

    def __init__(self, file: IO[bytes], records: Records) -> None:
        self._file = file
        self._records = records
        self._reads = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> Hashes:
        start, count = int(self._records["start"][position]), int(self._records["count"][position])
        self._reads += 1
        if self._reads % _READS == 0:
            release(self._records)
        return np.frombuffer(os.pread(self._file.fileno(), 4 * count, 4 * start), np.uint32).astype(np.uint64)

    def by_band(self) -> Partition:
        """Bands with equal numbers in one part."""
        return Partition(self._banded, _BANDS * len(self), _BAND)

    def _banded(self) -> Iterator[Records]:
        position = 0
        for part in pieces_of(self._records):
            positions = np.arange(position, position + len(part))
            for numbers in part["bands"][part["count"] > 0].T:
                found = np.zeros(len(numbers), _BAND)
                found["key"][:, 0], found["position"] = numbers, positions[part["count"] > 0]
                yield found
            position += len(part)


def _bands(hashes: Hashes) -> list[int]:
    """A number for each band of a text."""
    values = _signature(hashes).reshape(_BANDS, _VALUES)
    digests = (hashlib.blake2b(bytes([n]) + band.tobytes(), digest_size=8).digest() for n, band in enumerate(values))
    return [int.from_bytes(digest, "little") for digest in digests]


def _runs(text: str) -> Hashes:
    """Hashes of the different runs of words, or of all words where there are fewer than a run."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - _RUN + 1) if words else 0
    return np.unique(np.array([zlib.crc32(" ".join(words[n : n + _RUN]).encode()) for n in range(last)], np.uint64))


def _candidates(parts: Iterable[Records]) -> Iterator[tuple[int, int]]:
    """Pairs that share a band: each text with the first of its bucket and with the one before it."""
    for part in parts:
        order = np.argsort(part["key"][:, 0], kind="stable")
        numbers, positions = part["key"][order, 0], part["position"][order].tolist()
        first = 0
        for place in np.flatnonzero(numbers[1:] == numbers[:-1]).tolist():
            if not place or numbers[place - 1] != numbers[place]:
                first = place
            for other in {first, place}:
                yield positions[other], positions[place + 1]


def _signature(hashes: Hashes) -> Hashes:
    factors, offsets = _DRAWN
    least: Hashes = ((hashes[:, None] * factors + offsets) % _PRIME).min(axis=0)
    return least


def _jaccard(first: Hashes, second: Hashes) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


class _Groups:
    """Positions that belong together (union-find). The first of a group is its root."""

    def __init__(self, count: int) -> None:
        self._parents = row_array(count, np.int64)
        for window in windows(count):
            self._parents[window] = np.arange(window.start, window.stop)
        self._asked = 0

    def _root(self, position: int) -> int:
        parents = self._parents
        while (parent := int(parents[position])) != position:
            parents[position] = parents[parent]
            position = int(parents[position])
        self._asked += 1
        if self._asked % _READS == 0:
            release(parents)
        return position

    def together(self, first: int, second: int) -> bool:
        return self._root(first) == self._root(second)

    def join(self, first: int, second: int) -> None:
        roots = sorted((self._root(first), self._root(second)))
        self._parents[roots[1]] = roots[0]

    def of_several(self) -> Iterator[Positions]:
        """Each group's members, ascending: from each of them a link leads to the next."""
        count = len(self._parents)
        following, last = row_array(count, np.int64), row_array(count, np.int64)
        for position in range(count):
            root = self._root(position)
            if root != position:
                following[last[root] or root] = position
                last[root] = position
            if position % _READS == 0:
                release(following, last)
        for position in range(count):
            if following[position] and self._root(position) == position:
                yield np.fromiter(_chain(following, position), np.int64)


def _chain(following: Positions, position: int) -> Iterator[int]:
    yield position
    while position := int(following[position]):
        yield position

"""Texts that are almost the same, found without comparing each with each.

A text is the set of its runs of three words. MinHash (Broder 1997) keeps the least value of each of 64 hash functions
over that set: two texts share one of them with the probability of their Jaccard similarity |A and B| / |A or B|.
Texts that agree in all four values of one of 16 bands are compared exactly: of pairs with a similarity of 0.8 that
finds 99.98 %.
"""

import itertools
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from finetune.data.buffers import empty, joined
from finetune.data.columns import TEXTS, Positions, pieces_of, release, row_array, stored, windows
from finetune.data.partition import Partition, Records

Hashes = npt.NDArray[np.uint32]  # of a text's runs: different, ascending

SIMILARITY = 0.8
_RUN = 3  # words
_BANDS, _VALUES = 16, 4
_HASHES = 1_024  # of a text that are worked on at once
_PAIRS = 256  # that are worked on at once
_READS = 64  # of arrays on the disk at places anywhere, before their memory is given back
# A text: where its hashes are in the file, how many, and a number for each band; and a band by its number.
_SIGNED = np.dtype([("start", "<i8"), ("count", "<u4"), ("bands", "<u8", (_BANDS,))])
_BAND = np.dtype([("key", "<u8", (1,)), ("position", "<i8")])
_PAIR = np.dtype([("key", "<u8", (1,)), ("first", "<i8")])  # the key stands for the second text: see `_pairs`
_PRIME = np.uint64(4_294_967_311)  # the first above 2^32
_DRAWN = np.random.default_rng(0).integers(1, 2**31, size=(2, _BANDS * _VALUES)).astype(np.uint64)
_MIXED = np.random.default_rng(1).integers(2**64, size=(_BANDS, _VALUES), dtype=np.uint64)
_ADDED = np.random.default_rng(2).integers(2**64, size=_BANDS, dtype=np.uint64)


def near_groups(texts: Iterable[str]) -> Iterator[Positions]:
    """Positions of texts that are at least SIMILARITY to another of their group, in the order of their first ones.

    Texts without a word are left out. What is kept of a text is on the disk: its words' hashes, 150 bytes, and those
    that it may be near to.
    """
    with tempfile.TemporaryFile() as file:
        runs = _Runs(file, stored(_signed(texts, file), _SIGNED))
        found = _Groups(len(runs))
        for firsts, seconds in _pairs(runs):
            for first, second in found.apart(firsts, seconds):
                if not found.together(first, second) and runs.similarity(first, second) >= SIMILARITY:
                    found.join(first, second)
    yield from found.of_several()


def _signed(texts: Iterable[str], file: IO[bytes]) -> Iterator[Records]:
    """A record of each text, in pieces; its hashes go to the file."""
    start, coming = 0, iter(texts)
    while some := list(itertools.islice(coming, TEXTS)):
        records = np.zeros(len(some), _SIGNED)
        for record, text in zip(records, some, strict=True):
            hashes = _runs(text)
            file.write(hashes.data)
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
        self._second = (-1, np.empty(0, np.uint32))

    def __len__(self) -> int:
        return len(self._records)

    def similarity(self, first: int, second: int) -> float:
        """Of two texts. The second is kept for the next time."""
        if self._second[0] != second:
            self._second = second, self[second]
        return _jaccard(self[first], self._second[1])

    def __getitem__(self, position: int) -> Hashes:
        start, count = int(self._records["start"][position]), int(self._records["count"][position])
        self._reads += 1
        if self._reads % _READS == 0:
            release(self._records)
        return np.frombuffer(os.pread(self._file.fileno(), 4 * count, 4 * start), np.uint32)

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


def _bands(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """A number for each band of a text: a multilinear hash of its values, modulo 2^64."""
    numbers: npt.NDArray[np.uint64] = (_signature(hashes).reshape(_BANDS, _VALUES) * _MIXED).sum(axis=1)
    return numbers + _ADDED


def _runs(text: str) -> Hashes:
    """Hashes of the different runs of words, or of all words where there are fewer than a run."""
    words = [word.encode() for word in re.findall(r"\w+", text.lower())]
    runs = list(zip(*(words[n:] for n in range(_RUN)), strict=False)) or ([tuple(words)] if words else [])
    hashes = empty(len(runs), np.uint32)
    hashes[:] = list(map(zlib.crc32, map(b" ".join, runs)))
    hashes.sort()
    different = empty(len(hashes), np.bool_)
    different[:1] = True
    np.not_equal(hashes[1:], hashes[:-1], out=different[1:])
    return np.compress(different, hashes, out=empty(int(different.sum()), np.uint32))


def _signature(hashes: Hashes) -> npt.NDArray[np.uint64]:
    factors, offsets = _DRAWN
    least = np.full(len(factors), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(hashes), _HASHES):
        values = (hashes[start : start + _HASHES, None] * factors + offsets) % _PRIME
        np.minimum(least, values.min(axis=0), out=least)
    return least


def _pairs(runs: _Runs) -> Iterator[tuple[Positions, Positions]]:
    """Pairs that share a band, once each, in pieces: those of one second text follow each other.

    No text is the second of more than two pairs for each band. So parts by their number are as even as by a hash, and
    it can be the key: times a factor, as keys are spread over 64 bits.
    """
    factor = np.uint64(2**64 // max(1, len(runs)) - 1)
    pairs = stored(_candidates(runs.by_band(), factor), _PAIR)
    for part in Partition(lambda: pieces_of(pairs), len(pairs), _PAIR):
        keys, firsts = part["key"][:, 0], part["first"]
        order = np.lexsort((firsts, keys))
        keys, firsts = keys[order], firsts[order]
        new = np.ones(len(order), np.bool_)
        new[1:] = (keys[1:] != keys[:-1]) | (firsts[1:] != firsts[:-1])
        begins = np.flatnonzero(new)
        shared = np.diff(begins, append=len(keys))
        begins = begins[np.lexsort((-shared, keys[begins]))]  # the most similar first: they make others superfluous
        for start in range(0, len(begins), _PAIRS):
            some = begins[start : start + _PAIRS]
            yield firsts[some], (keys[some] // factor).astype(np.int64)


def _candidates(parts: Iterable[Records], factor: np.uint64) -> Iterator[Records]:
    """Pairs that share a band: each text with the first of its bucket and with the one before it."""
    for part in parts:
        order = np.argsort(part["key"][:, 0], kind="stable")
        numbers, positions = part["key"][order, 0], part["position"][order]
        same = np.zeros(len(order), np.bool_)
        same[1:] = numbers[1:] == numbers[:-1]
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
        places = np.flatnonzero(same)
        for others in (places - 1, first[places]):
            found = np.zeros(len(places), _PAIR)
            found["key"][:, 0], found["first"] = positions[places].astype(np.uint64) * factor, positions[others]
            yield found


def _jaccard(first: Hashes, second: Hashes) -> float:
    both = joined(first, second)
    both.sort()
    shared = np.count_nonzero(np.equal(both[1:], both[:-1], out=empty(len(both) - 1, np.bool_)))
    return shared / (len(both) - shared)


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

    def apart(self, firsts: Positions, seconds: Positions) -> list[tuple[int, int]]:
        """Those pairs that are in different groups."""
        apart = self._roots(firsts) != self._roots(seconds)
        return list(zip(firsts[apart].tolist(), seconds[apart].tolist(), strict=True))

    def _roots(self, positions: Positions) -> Positions:
        while True:
            parents = self._parents[positions]
            release(self._parents)
            if np.array_equal(parents, positions):
                return positions
            positions = parents

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

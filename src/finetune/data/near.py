"""Texts that are almost the same, found without comparing each with each.

A text is the set of its runs of three words. MinHash (Broder 1997) keeps the least value of each of 64 hash functions
over that set: two texts share one of them with the probability of their Jaccard similarity |A and B| / |A or B|.
Texts that agree in all four values of one of 16 bands are compared exactly: of pairs with a similarity of 0.8 that
finds 99.98 %.
"""

import hashlib
import re
import tempfile
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SIMILARITY = 0.8
_RUN = 3  # words
_BANDS, _VALUES = 16, 4
_PRIME = np.uint64(4_294_967_311)  # the first above 2^32
_DRAWN = np.random.default_rng(0).integers(1, 2**31, size=(2, _BANDS * _VALUES)).astype(np.uint64)


def near_groups(texts: Iterable[str]) -> list[list[int]]:
    """Positions of texts that are at least SIMILARITY to another of their group; texts without a word are left out.

    Needs about 200 bytes of memory a text, whatever its length, and room for its words' hashes on the disk.
    """
    with _StoredRuns() as runs:
        bands, positions = _bands(texts, runs)
        found = _Groups(len(runs))
        for first, second in _candidates(bands, positions):
            if not found.together(first, second) and _jaccard(runs[first], runs[second]) >= SIMILARITY:
                found.join(first, second)
    return found.of_several()


class _StoredRuns:
    """The hashes of each text, in a file that is gone when it is closed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._ends = array("Q", [0])

    def __enter__(self) -> "_StoredRuns":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, hashes: Hashes) -> None:
        self._file.write(hashes.astype(np.uint32).tobytes())
        self._ends.append(self._ends[-1] + len(hashes))

    def __getitem__(self, position: int) -> Hashes:
        start, end = self._ends[position], self._ends[position + 1]
        self._file.seek(4 * start)
        return np.frombuffer(self._file.read(4 * (end - start)), np.uint32).astype(np.uint64)


def _bands(texts: Iterable[str], runs: _StoredRuns) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """A number for each band of each text that has words [texts, bands], and the positions of these texts."""
    numbers, positions = array("Q"), array("q")
    for position, text in enumerate(texts):
        hashes = _runs(text)
        runs.add(hashes)
        if len(hashes):
            positions.append(position)
            values = _signature(hashes).reshape(_BANDS, _VALUES)
            digests = b"".join(hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in values)
            numbers.frombytes(digests)
    return np.frombuffer(numbers, np.uint64).reshape(-1, _BANDS), np.frombuffer(positions, np.int64)


def _runs(text: str) -> Hashes:
    """Hashes of the different runs of words, or of all words where there are fewer than a run."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - _RUN + 1) if words else 0
    return np.unique(np.array([zlib.crc32(" ".join(words[n : n + _RUN]).encode()) for n in range(last)], np.uint64))


def _candidates(bands: Hashes, positions: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs that share a band: each text with the first of its bucket and with the one before it."""
    for numbers in bands.T:
        order = np.argsort(numbers, kind="stable")
        first = 0
        for place in np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]]).tolist():
            if not place or numbers[order[place - 1]] != numbers[order[place]]:
                first = place
            for other in {first, place}:
                yield int(positions[order[other]]), int(positions[order[place + 1]])


def _signature(hashes: Hashes) -> Hashes:
    factors, offsets = _DRAWN
    least: Hashes = ((hashes[:, None] * factors + offsets) % _PRIME).min(axis=0)
    return least


def _jaccard(first: Hashes, second: Hashes) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


class _Groups:
    """Positions that belong together (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def _root(self, position: int) -> int:
        while self._parents[position] != position:
            self._parents[position] = self._parents[self._parents[position]]
            position = self._parents[position]
        return position

    def together(self, first: int, second: int) -> bool:
        return self._root(first) == self._root(second)

    def join(self, first: int, second: int) -> None:
        roots = sorted((self._root(first), self._root(second)))
        self._parents[roots[1]] = roots[0]

    def of_several(self) -> list[list[int]]:
        members: dict[int, list[int]] = defaultdict(list)
        for position in range(len(self._parents)):
            members[self._root(position)].append(position)
        return [group for group in members.values() if len(group) > 1]

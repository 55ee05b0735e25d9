"""Texts that are almost the same, found without comparing each with each.

A text is the set of its runs of three words. MinHash (Broder 1997) keeps the least value of each of 64 hash functions
over that set: two texts share one of them with the probability of their Jaccard similarity |A and B| / |A or B|.
Texts that agree in all four values of one of 16 bands are compared exactly: of pairs with a similarity of 0.8 that
finds 99.98 %.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SIMILARITY = 0.8
_RUN = 3  # words
_BANDS, _VALUES = 16, 4
_PRIME = np.uint64(4_294_967_311)  # the first above 2^32
_DRAWN = np.random.default_rng(0).integers(1, 2**31, size=(2, _BANDS * _VALUES)).astype(np.uint64)


def near_groups(texts: Sequence[str]) -> list[list[int]]:
    """Positions of texts that are at least SIMILARITY to another of their group; texts without a word are left out."""
    runs = [_runs(text) for text in texts]
    found = _Groups(len(texts))
    for first, second in _candidates(runs):
        if not found.together(first, second) and _jaccard(runs[first], runs[second]) >= SIMILARITY:
            found.join(first, second)
    return found.of_several()


def _runs(text: str) -> Hashes:
    """Hashes of the different runs of words, or of all words where there are fewer than a run."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - _RUN + 1) if words else 0
    return np.unique(np.array([zlib.crc32(" ".join(words[n : n + _RUN]).encode()) for n in range(last)], np.uint64))


def _candidates(runs: Sequence[Hashes]) -> Iterator[tuple[int, int]]:
    """Pairs that share a band: each text with the first of its bucket and with the one before it."""
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for position, hashes in enumerate(runs):
        if not len(hashes):
            continue
        for band, values in enumerate(_signature(hashes).reshape(_BANDS, _VALUES)):
            bucket = buckets[band, values.tobytes()]
            for other in {*bucket[:1], *bucket[-1:]}:
                yield other, position
            bucket.append(position)


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

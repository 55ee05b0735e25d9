"""Keys and values of the requests under way, in blocks of rows of like length.

A `Cache` holds rows of at most `capacity` tokens. Those that requests share have a power of two, and a row that
outgrows its cache moves to the next larger one: memory stays below twice what the lengths need, and the rows of one
cache can be attended to in one product with little padding. They lie side by side in its first slots.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SHARED = 256  # tokens; shorter rows gain nothing from a cache of their own


class LayerValues(NamedTuple):
    """What one row has in one layer."""

    layer: int
    keys: Tensor  # [G, length, D]
    values: Tensor  # [G, length, D]


@dataclass(slots=True, eq=False)
class CachedRow:
    """Where the keys and values of one request are."""

    cache: "Cache"
    slot: int
    length: int = 0  # tokens whose keys and values are there

    def layers(self, length: int | None = None) -> Iterator[LayerValues]:
        """Views of all that the row has, or of its first tokens."""
        return self.cache.read(self.slot, self.length if length is None else length)


class Cache:
    """Keys and values of several rows for all layers, each [slots, G, capacity, D]."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[CachedRow] = []
        self._slots = 1
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """What the arrays take."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def layer(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made on the first call with the heads, width and type of [G, n, D]."""
        if number not in self._layers:
            self._layers[number] = (self._zeros(keys), self._zeros(values))
        return self._layers[number]

    def _zeros(self, like: Tensor) -> Tensor:
        """What memory happens to hold could be NaN, which a weight of zero does not hide."""
        return like.new_zeros(self._slots, like.shape[0], self.capacity, like.shape[2])

    def read(self, slot: int, length: int) -> Iterator[LayerValues]:
        """Views of the first tokens of a row."""
        for number, (keys, values) in self._layers.items():
            yield LayerValues(number, keys[slot, :, :length], values[slot, :, :length])

    def insert(self, layers: Iterable[LayerValues], length: int) -> CachedRow:
        """A copy of what another row has, in the next slot."""
        if len(self.rows) == self._slots:
            self._double()
        row = CachedRow(self, len(self.rows), length)
        self.rows.append(row)
        self._write(row.slot, layers)
        return row

    def _write(self, slot: int, layers: Iterable[LayerValues]) -> None:
        for number, key, value in layers:
            keys, values = self.layer(number, key, value)
            keys[slot, :, : key.shape[1]] = key
            values[slot, :, : value.shape[1]] = value

    def _double(self) -> None:
        self._slots *= 2
        for number, pair in self._layers.items():
            keys, values = (torch.cat([tensor, torch.zeros_like(tensor)]) for tensor in pair)
            self._layers[number] = (keys, values)

    def release(self, row: CachedRow) -> None:
        """Forget a row; the last one takes its slot."""
        last = self.rows.pop()
        if last is not row:
            self._write(row.slot, last.layers())
            last.slot = row.slot
            self.rows[row.slot] = last


def row_alone(capacity: int, begun: Iterable[LayerValues] = (), length: int = 0) -> CachedRow:
    """A row in a cache of its own, which begins with a copy of `length` tokens."""
    return Cache(capacity).insert(begun, length)


def with_room(row: CachedRow, tokens: int) -> CachedRow:
    """The row alone in a cache for so many tokens: itself, or a copy in one of at least twice its size."""
    if row.cache.capacity >= tokens:
        return row
    return row_alone(max(tokens, 2 * row.length), row.layers(), row.length)


@dataclass(slots=True)
class SharedCaches:
    """The caches that the rows of a batch share, by capacity."""

    _caches: dict[int, Cache] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Cache]:
        return iter(self._caches.values())

    def insert(self, row: CachedRow) -> CachedRow:
        """A copy of the row among those of its length, with room for one more token."""
        capacity = max(SMALLEST_SHARED, 1 << row.length.bit_length())
        return self._caches.setdefault(capacity, Cache(capacity)).insert(row.layers(), row.length)

    def with_room(self, row: CachedRow) -> CachedRow:
        """A row of these caches, moved where it has outgrown its own: one more token fits."""
        if row.length < row.cache.capacity:
            return row
        moved = self.insert(row)
        self.release(row)
        return moved

    def release(self, row: CachedRow) -> None:
        """Forget a row. A cache without rows keeps no memory."""
        row.cache.release(row)
        if not row.cache.rows:
            del self._caches[row.cache.capacity]

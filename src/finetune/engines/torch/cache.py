"""Keys and values of the requests under way, in blocks of rows of like length.

A `Cache` holds rows of at most `capacity` tokens. Those that requests share have a power of two, and a row that
outgrows its cache moves to the next larger one: memory stays below twice what the lengths need, and the rows of one
cache can be attended to in one product with little padding. They lie side by side in its first slots.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

SMALLEST_SHARED = 256  # tokens; shorter rows gain nothing from a cache of their own
_SHARED_SLOTS = 8  # at first: the system gives memory to those that are written


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

    def __init__(self, capacity: int, slots: int = 1) -> None:
        self.capacity = capacity
        self.rows: list[CachedRow] = []
        self._slots = slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """What the arrays take."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def layer(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made on the first call with the heads, width and type of [G, n, D]."""
        if number not in self._layers:
            self._layers[number] = (self._empty(keys), self._empty(values))
        return self._layers[number]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(self._slots, like.shape[0], self.capacity, like.shape[2])

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
        """Behind a row come zeros where longer ones lie beside it: a weight of zero does not hide a NaN."""
        for number, key, value in layers:
            for whole, part in zip(self.layer(number, key, value), (key, value), strict=True):
                whole[slot, :, : part.shape[1]] = part
                if self._slots > 1:
                    whole[slot, :, part.shape[1] :] = 0

    def _double(self) -> None:
        before = self._slots
        self._slots *= 2
        for number, pair in self._layers.items():
            self._layers[number] = keys, values = (self._empty(pair[0][0]), self._empty(pair[1][0]))
            keys[:before], values[:before] = pair

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
        return self._caches.setdefault(capacity, Cache(capacity, _SHARED_SLOTS)).insert(row.layers(), row.length)

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

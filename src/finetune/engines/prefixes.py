"""Remembers what models have read: a prompt that begins like an earlier one reads only what is new.

The next turn of a chat begins with all turns before it, and requests of one application with the same system
message. A cache of keys and values depends on every weight, so each adapter has prefixes of its own.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from finetune.core.types import IntArray

PREFIX_BYTES = 256 << 20  # of caches that are kept for later requests
FEWEST_TOKENS = 4  # that are worth looking up

Cache = TypeVar("Cache")


@dataclass(frozen=True, slots=True)
class Prefix(Generic[Cache]):
    """Tokens that an adapter has read, and the engine's cache of them, which nobody changes."""

    adapter: Hashable
    tokens: IntArray
    cache: Cache
    size: int  # bytes
    shortest: int = 0  # the fewest of its first tokens that the cache can be cut to (more with sliding windows)

    def shared(self, tokens: IntArray) -> int:
        """How many tokens of a prompt this cache can stand for."""
        length = min(len(self.tokens), len(tokens))
        different = np.flatnonzero(self.tokens[:length] != tokens[:length])
        common = int(different[0]) if len(different) else length
        return common if common >= self.shortest else 0

    def begins(self, other: "Prefix[Cache]") -> bool:
        """Whether the other cache can stand for all that this one can."""
        length = len(self.tokens)
        return self.adapter == other.adapter and other.shared(self.tokens) == length and other.shortest <= self.shortest


class Found(NamedTuple, Generic[Cache]):
    """A cache whose first `length` tokens are those of a prompt."""

    cache: Cache
    length: int


@dataclass(slots=True)
class PrefixCache(Generic[Cache]):
    """Prefixes up to a number of bytes; the least recently used one is forgotten first."""

    budget: int = PREFIX_BYTES
    size: int = 0  # bytes held
    _prefixes: OrderedDict[int, Prefix[Cache]] = field(default_factory=OrderedDict)
    _next: int = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def find(self, adapter: Hashable, tokens: Sequence[int]) -> Found[Cache] | None:
        """The cache that stands for most of the first tokens, and for how many; it counts as used now."""
        wanted = np.array(tokens, np.int32)
        shared = {
            number: prefix.shared(wanted) for number, prefix in self._prefixes.items() if prefix.adapter == adapter
        }
        best = max(shared, key=shared.__getitem__, default=None)
        if best is None or shared[best] < FEWEST_TOKENS:
            return None
        self._prefixes.move_to_end(best)
        return Found(self._prefixes[best].cache, shared[best])

    def store(self, adapter: Hashable, tokens: Sequence[int], cache: Cache, *, size: int, shortest: int = 0) -> None:
        """Keep a cache of `size` bytes, which must not change any more, in place of those that it makes needless."""
        new = Prefix(adapter, np.array(tokens, np.int32), cache, size, shortest)
        if size > self.budget or len(new.tokens) < FEWEST_TOKENS or any(map(new.begins, self._prefixes.values())):
            return
        for number in [number for number, prefix in self._prefixes.items() if prefix.begins(new)]:
            self._drop(number)
        self._prefixes[self._next] = new
        self._next += 1
        self.size += size
        while self.size > self.budget:
            self._drop(next(iter(self._prefixes)))

    def clear(self) -> None:
        """Drop everything."""
        self._prefixes.clear()
        self.size = 0

    def forget(self, adapter: Hashable) -> None:
        """Drop what an adapter has read."""
        for number in [number for number, prefix in self._prefixes.items() if prefix.adapter == adapter]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        self.size -= self._prefixes.pop(number).size

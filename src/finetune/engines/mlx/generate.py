"""The arrays of continuous decoding: one forward pass for all rows of a batch, whatever their lengths and adapters.

Rows that read their prompts have caches of their own; the batch has one cache for each layer (see `ragged`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from finetune.core.types import BoolArray, GenerationRequest
from finetune.engines.base import Generator
from finetune.engines.continuous import CacheSize, ContinuousGenerator
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.ragged import LayerCache, RowLengths
from finetune.engines.mlx.resident import AdaptedModel, LoadedAdapter
from finetune.engines.mlx.sampling import Chosen, RowSampler, moved
from finetune.engines.mlx.solo import SoloCache, SoloRows
from finetune.engines.prefixes import PrefixCache
from finetune.engines.scheduling import limits_for

_COLUMNS = 128  # that the batch makes room for at once
_SHORT = 128  # tokens of a prompt up to which reading it alone leaves the device idle
_MOST_PADDED = 1.25  # columns for each token that is read together with others


@dataclass(frozen=True, slots=True, eq=False)
class RowCache:
    """Keys and values of one row, read with its adapter, and tokens that it reads before they are needed."""

    adapter: LoadedAdapter
    rows: RowLengths  # of one
    layers: list[LayerCache]
    unread: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that are read or will be."""
        return self.rows[0] + len(self.unread)


def make_generator(model: AdaptedModel, prefixes: PrefixCache[RowCache] | None = None) -> Generator:
    """A generator over a model; `prefixes` outlive it, as long as its weights stay."""
    limits = limits_for(model.base.config, model.base.dtype.size)
    if not model.rows_share:
        solo: PrefixCache[SoloCache] = PrefixCache()
        return ContinuousGenerator(SoloRows(model), solo, limits)
    return ContinuousGenerator(MLXRows(model), PrefixCache() if prefixes is None else prefixes, limits)


class MLXRows:
    """Implements `RowBatch`."""

    works_ahead = True

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._windows = compat.cache_windows(model.base.model)
        self._rows = RowLengths([])
        self._layers = [LayerCache(self._rows, window, columns=_COLUMNS) for window in self._windows]
        self._adapters: list[LoadedAdapter] = []
        self._updates: Mapping[str, Any] = {}
        self._newest: Any = mx.zeros(0, mx.int32)  # [B], chosen and not yet read
        self._sampler = RowSampler(self.vocabulary)
        self._reading: list[RowCache] = []  # rows with unread tokens
        self._joining: list[tuple[RowCache, GenerationRequest]] = []  # that become rows of the batch
        self._token_bytes = 0  # of keys and values; 0 until some are there

    @property
    def vocabulary(self) -> int:
        return self._model.base.vocabulary

    def adapter(self, name: str | None) -> LoadedAdapter:
        return self._model.adapter(name)

    def start(self, adapter: LoadedAdapter, begun: RowCache | None, length: int) -> RowCache:
        rows = RowLengths([length])
        if begun is None:
            return RowCache(adapter, rows, [LayerCache(rows, window) for window in self._windows])
        if begun.unread:
            self._read_together([begun])
        dropped = begun.rows[0] - length
        return RowCache(adapter, rows, [layer.copied(0, rows, dropped=dropped) for layer in begun.layers])

    def read(self, cache: RowCache, tokens: Sequence[int]) -> None:
        if cache.unread:
            self._catch_up()  # a part at a time is in memory
        self._reading.append(cache)
        cache.unread.extend(tokens)

    def join(self, cache: RowCache, request: GenerationRequest) -> None:
        self._joining.append((cache, request))

    def _catch_up(self) -> None:
        """Let all rows read what they were given, short prompts together, and take those in that are to join."""
        with explained_memory():
            for group in side_by_side([cache for cache in self._reading if cache.unread]):
                self._read_together(group)
            self._reading = []
            for cache, request in self._joining:
                self._take_in(cache, request)
            if self._joining:
                self._updates = self._model.updates(self._adapters)
            self._joining = []

    def _read_together(self, group: Sequence[RowCache]) -> None:
        """One pass for rows without a past, or for one row; the shorter ones are padded in front."""
        longest = max(len(cache.unread) for cache in group)
        rows, layers = group[0].rows, group[0].layers
        if len(group) > 1:
            rows = RowLengths([len(cache.unread) - longest for cache in group])
            layers = [LayerCache(rows, window) for window in self._windows]
        tokens = [[0] * (longest - len(cache.unread)) + cache.unread for cache in group]
        self._model.use(self._model.updates([cache.adapter for cache in group]))
        self._model.base.split.body(mx.array(tokens, mx.int32), cache=layers)
        for row, cache in enumerate(group):
            if len(group) > 1:
                for mine, theirs in zip(cache.layers, layers, strict=True):
                    mine.take(theirs, row, len(cache.unread))
            cache.rows.advance(len(cache.unread))
            cache.unread.clear()
            mx.async_eval([layer.arrays() for layer in cache.layers])  # type: ignore[no-untyped-call]

    def _take_in(self, cache: RowCache, request: GenerationRequest) -> None:
        for mine, theirs in zip(self._layers, cache.layers, strict=True):
            mine.join(theirs)
        self._rows.join(cache.rows[0])
        self._adapters.append(cache.adapter)
        self._newest = mx.concatenate([self._newest, mx.array([request.prompt[-1]], mx.int32)])
        self._sampler.join(request)

    def leave(self, index: int) -> None:
        self._catch_up()
        for layer in self._layers:
            layer.leave(index)
        order = moved(len(self._rows), index)
        self._rows.leave(index)
        self._adapters = [self._adapters[row] for row in order]
        self._newest = self._newest[mx.array(order, mx.int32)]
        self._sampler.leave(index)
        if self._adapters:
            self._updates = self._model.updates(self._adapters)

    def decode(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        self._catch_up()
        with explained_memory():
            self._model.use(self._updates)
            split = self._model.base.split
            hidden = split.body(self._newest[:, None], cache=self._layers)
            self._rows.advance(1)
            chosen = self._sampler.choose(split.logits(hidden[:, -1]), numbers, allowed)
            self._newest = chosen.tokens
            mx.async_eval(chosen.arrays(), self._sampler.state())  # type: ignore[no-untyped-call]
            return chosen

    def copy(self, index: int) -> RowCache:
        self._catch_up()
        rows = RowLengths([self._rows[index]])
        layers = [layer.copied(index, rows) for layer in self._layers]
        mx.async_eval([layer.arrays() for layer in layers])  # type: ignore[no-untyped-call]
        return RowCache(self._adapters[index], rows, layers)

    def size(self, cache: RowCache) -> CacheSize:
        if cache.unread and not self._token_bytes:
            self._catch_up()
        if cache.unread:
            size = cache.length * self._token_bytes
        else:
            size = sum(layer.nbytes for layer in cache.layers)
            self._token_bytes = size // max(1, cache.length)
        whole = all(window is None or cache.length < window for window in self._windows)
        return CacheSize(size, 0 if whole else cache.length)


def side_by_side(caches: Sequence[RowCache]) -> Iterator[list[RowCache]]:
    """Which rows read together: short prompts of like lengths that have no past; every other one reads alone."""
    group: list[RowCache] = []
    for cache in sorted(caches, key=lambda cache: len(cache.unread)):
        length = len(cache.unread)
        fits = cache.rows[0] == 0 and length <= _SHORT
        real = sum(len(one.unread) for one in group) + length
        if group and (not fits or (len(group) + 1) * length > _MOST_PADDED * real):
            yield group
            group = []
        if fits:
            group.append(cache)
        else:
            yield [cache]
    if group:
        yield group

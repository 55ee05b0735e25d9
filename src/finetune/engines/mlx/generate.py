"""The arrays of continuous decoding: one forward pass for all rows of a batch, whatever their lengths and adapters.

Rows that read their prompts have caches of their own; the batch has one cache for each layer (see `ragged`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_COLUMNS = 128  # that the batch makes room for at once


@dataclass(frozen=True, slots=True)
class RowCache:
    """Keys and values of one row, read with its adapter."""

    adapter: LoadedAdapter
    rows: RowLengths  # of one
    layers: list[LayerCache]


def make_generator(model: AdaptedModel, prefixes: PrefixCache[RowCache] | None = None) -> Generator:
    """A generator over a model; `prefixes` outlive it, as long as its weights stay."""
    if not model.rows_share:
        solo: PrefixCache[SoloCache] = PrefixCache()
        return ContinuousGenerator(SoloRows(model), solo)
    return ContinuousGenerator(MLXRows(model), PrefixCache() if prefixes is None else prefixes)


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

    @property
    def vocabulary(self) -> int:
        return self._model.base.vocabulary

    def adapter(self, name: str | None) -> LoadedAdapter:
        return self._model.adapter(name)

    def start(self, adapter: LoadedAdapter, begun: RowCache | None, length: int) -> RowCache:
        rows = RowLengths([length])
        if begun is None:
            return RowCache(adapter, rows, [LayerCache(rows, window) for window in self._windows])
        dropped = begun.rows[0] - length
        return RowCache(adapter, rows, [layer.copied(0, rows, dropped=dropped) for layer in begun.layers])

    def read(self, cache: RowCache, tokens: Sequence[int]) -> None:
        with explained_memory():
            self._model.use(self._model.updates([cache.adapter]))
            self._model.base.split.body(mx.array(list(tokens), mx.int32)[None], cache=cache.layers)
            cache.rows.advance(len(tokens))
            mx.async_eval([layer.arrays() for layer in cache.layers])  # type: ignore[no-untyped-call]

    def join(self, cache: RowCache, request: GenerationRequest) -> None:
        for mine, theirs in zip(self._layers, cache.layers, strict=True):
            mine.join(theirs)
        self._rows.join(cache.rows[0])
        self._adapters.append(cache.adapter)
        self._newest = mx.concatenate([self._newest, mx.array([request.prompt[-1]], mx.int32)])
        self._sampler.join(request)
        self._updates = self._model.updates(self._adapters)

    def leave(self, index: int) -> None:
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
        rows = RowLengths([self._rows[index]])
        layers = [layer.copied(index, rows) for layer in self._layers]
        mx.async_eval([layer.arrays() for layer in layers])  # type: ignore[no-untyped-call]
        return RowCache(self._adapters[index], rows, layers)

    def size(self, cache: RowCache) -> CacheSize:
        whole = all(layer.kept == layer.longest for layer in cache.layers)
        return CacheSize(sum(layer.nbytes for layer in cache.layers), 0 if whole else cache.rows[0])

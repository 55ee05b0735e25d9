"""Decoding for models whose rows cannot share a pass: state-space layers, positions that only the model knows.

Each row keeps mlx-lm's own caches, and a step goes through the rows one after the other. Sampling is that of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from finetune.core.types import BoolArray, GenerationRequest
from finetune.engines.continuous import CacheSize
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.resident import AdaptedModel, LoadedAdapter
from finetune.engines.mlx.sampling import Chosen, RowSampler

_NEVER_KEPT = 1 << 62  # bytes: more than any memory for prefixes


@dataclass(frozen=True, slots=True)
class SoloCache:
    """One row's caches, as mlx-lm makes them for the model."""

    adapter: LoadedAdapter
    layers: list[Any]


class SoloRows:
    """Implements `RowBatch` without a batch."""

    works_ahead = True

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._rows: list[SoloCache] = []
        self._newest: list[Any] = []  # [1] each, chosen and not yet read
        self._sampler = RowSampler(self.vocabulary)

    @property
    def vocabulary(self) -> int:
        return self._model.base.vocabulary

    def adapter(self, name: str | None) -> LoadedAdapter:
        return self._model.adapter(name)

    def start(self, adapter: LoadedAdapter, begun: SoloCache | None, length: int) -> SoloCache:
        return SoloCache(adapter, compat.new_cache(self._model.base.model))

    def read(self, cache: SoloCache, tokens: Sequence[int]) -> None:
        with explained_memory():
            mx.eval(self._hidden(cache, mx.array(list(tokens), mx.int32)))

    def join(self, cache: SoloCache, request: GenerationRequest) -> None:
        self._rows.append(cache)
        self._newest.append(mx.array([request.prompt[-1]], mx.int32))
        self._sampler.extend(RowSampler(self.vocabulary, [request]))

    def leave(self, index: int) -> None:
        for rows in (self._rows, self._newest):
            rows[index] = rows[-1]
            rows.pop()
        self._sampler.leave(index)

    def begin(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> None:
        """New rows decode with the others."""

    def decode(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        with explained_memory():
            hidden = [self._hidden(row, token)[:, -1] for row, token in zip(self._rows, self._newest, strict=True)]
            logits = self._model.base.split.logits(mx.concatenate(hidden))
            chosen = self._sampler.choose(logits, numbers, allowed, range(len(self._rows)))
            self._newest = [chosen.tokens[row : row + 1] for row in range(len(self._rows))]
            mx.async_eval(chosen.arrays(), self._sampler.state())  # type: ignore[no-untyped-call]
            return chosen

    def _hidden(self, cache: SoloCache, tokens: Any) -> Any:
        self._model.use(self._model.updates([cache.adapter]))
        return self._model.base.split.body(tokens[None], cache=cache.layers)

    def copy(self, index: int) -> SoloCache:
        return self._rows[index]

    def size(self, cache: SoloCache) -> CacheSize:
        return CacheSize(_NEVER_KEPT)  # the caches go on changing

"""The arrays of continuous decoding: one forward pass for all rows of a batch, whatever their lengths and adapters.

Rows that read their prompts have caches of their own; the batch has one cache for each layer (see `ragged`). New rows
read what is left of their prompts before the others go on, short ones side by side, and the logits of a prompt's end
give the first token: it takes no pass besides. On the CPU a step of the others is computed a few layers at a time, and
a prompt that comes in the middle of it is read in between.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from finetune.core.types import BoolArray, GenerationRequest
from finetune.engines.base import Generator
from finetune.engines.continuous import CacheSize, ContinuousGenerator, of_places
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.ragged import LayerCache, RowLengths
from finetune.engines.mlx.resident import AdaptedModel, LoadedAdapter
from finetune.engines.mlx.sampling import Chosen, RowSampler, moved
from finetune.engines.mlx.solo import SoloCache, SoloRows
from finetune.engines.mlx.untraced import undifferentiated
from finetune.engines.prefixes import PrefixCache
from finetune.engines.scheduling import PARTS, between_parts, limits_for

_COLUMNS = 128  # that the batch makes room for at once
_SHORT = 128  # tokens of a prompt up to which reading it alone leaves the device idle
_MOST_PAST = 128  # columns of keys and values that are laid side by side for it: longer ones cost more than they save
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


@dataclass(slots=True, eq=False)
class _Row:
    """One row of the batch. It has a cache of its own until it has a slot of the arrays."""

    request: GenerationRequest
    adapter: LoadedAdapter
    cache: RowCache | None


class MLXRows:
    """Implements `RowBatch`."""

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self.works_ahead = not compat.on_cpu()  # there, MLX takes a step when the one before is done
        self._windows = compat.cache_windows(model.base.model)
        self._rows: list[_Row] = []  # in the caller's order
        self._slots: list[_Row] = []  # in the order of the arrays
        self._lengths = RowLengths([])
        self._early = compat.on_cpu()  # a GPU is busy while Python prepares the next step
        first_part = len(self._windows) // PARTS
        self._layers = [
            LayerCache(self._lengths, window, columns=_COLUMNS, early=self._early and number <= first_part)
            for number, window in enumerate(self._windows)
        ]
        self._updates: Mapping[str, Any] | None = {}  # of the slots; None: to be made
        self._newest: Any = mx.zeros(0, mx.int32)  # [slots], chosen and not yet read
        self._sampler = RowSampler(self.vocabulary)
        self._parts: dict[RowCache, None] = {}  # that have been given something to read, in the order of their coming
        self._token_bytes = 0  # of keys and values; 0 until some are there

    @property
    def vocabulary(self) -> int:
        return self._model.base.vocabulary

    def adapter(self, name: str | None) -> LoadedAdapter:
        return self._model.adapter(name)

    def start(self, adapter: LoadedAdapter, begun: RowCache | None, length: int) -> RowCache:
        rows = RowLengths([length])
        if begun is None:
            return RowCache(adapter, rows, self._new_layers(rows))
        self._read([begun])
        dropped = begun.rows[0] - length
        return RowCache(
            adapter, rows, [layer.copied(0, rows, dropped=dropped, early=self._early) for layer in begun.layers]
        )

    def _new_layers(self, rows: RowLengths) -> list[LayerCache]:
        """Caches for rows that read."""
        return [LayerCache(rows, window, early=self._early) for window in self._windows]

    def read(self, cache: RowCache, tokens: Sequence[int]) -> None:
        self._read([cache])  # a part at a time is in memory
        self._parts[cache] = None
        cache.unread.extend(tokens)

    def join(self, cache: RowCache, request: GenerationRequest) -> None:
        self._rows.append(_Row(request, cache.adapter, cache))

    def leave(self, index: int) -> None:
        row = self._rows[index]
        self._rows[index] = self._rows[-1]
        self._rows.pop()
        if row.cache is None:
            self._give_up(self._slots.index(row))

    def _give_up(self, slot: int) -> None:
        for layer in self._layers:
            layer.leave(slot)
        order = moved(len(self._slots), slot)
        self._lengths.leave(slot)
        self._slots = [self._slots[one] for one in order]
        self._newest = self._newest[mx.array(order, mx.int32)]
        self._sampler.leave(slot)
        self._updates = None

    def begin(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen | None:
        with explained_memory():
            new = {row.cache: row for row in self._rows if row.cache is not None}
            reading = [cache for cache in new if self._reads_to_the_end(cache)]
            if not reading:
                return None
            return self._begin({cache: new[cache] for cache in next(side_by_side(reading))}, numbers, allowed)

    def decode(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        with explained_memory():
            self._read(self._parts)
            self._parts.clear()
            new = {row.cache: row for row in self._rows if row.cache is not None}
            requests = [row.request for row in new.values()]
            self._take_in(new, mx.array([request.prompt[-1] for request in requests], mx.int32))
            self._sampler.extend(RowSampler(self.vocabulary, requests))
            return self._decode_slots(numbers, allowed)

    def _reads_to_the_end(self, cache: RowCache) -> bool:
        """Whether a row reads the rest of its prompt with the last token, which what is kept of it must survive."""
        return bool(cache.unread) and all(window is None or cache.length + 1 < window for window in self._windows)

    def _begin(
        self, group: Mapping[RowCache, _Row], numbers: Sequence[int], allowed: Mapping[int, BoolArray]
    ) -> Chosen:
        """Read to the end of some prompts, and choose the first tokens of their answers."""
        places = [self._rows.index(row) for row in group.values()]
        for cache, row in group.items():
            cache.unread.append(row.request.prompt[-1])
        logits = self._model.base.split.logits(self._read_together(list(group)))
        sampler = RowSampler(self.vocabulary, [row.request for row in group.values()])
        chosen = sampler.choose(logits, [numbers[place] for place in places], of_places(allowed, places), places)
        mx.async_eval(chosen.arrays(), sampler.state())  # type: ignore[no-untyped-call]
        self._take_in(group, chosen.tokens)
        self._sampler.extend(sampler)
        return chosen

    def _take_in(self, rows: Mapping[RowCache, _Row], newest: Any) -> None:
        """Give rows slots, with the token [rows] that each reads next."""
        if not rows:
            return
        for cache, row in rows.items():
            for mine, theirs in zip(self._layers, cache.layers, strict=True):
                mine.join(theirs)
            self._lengths.join(cache.rows[0])
            row.cache = None
        self._slots += rows.values()
        self._newest = mx.concatenate([self._newest, newest])
        self._updates = None

    def _decode_slots(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        if self._updates is None:
            self._updates = self._model.updates([row.adapter for row in self._slots])
        self._model.use(self._updates)
        logits = self._model.base.split.logits(self._ends(self._newest[:, None], self._layers))
        self._lengths.advance(1)
        places = [self._rows.index(row) for row in self._slots]
        chosen = self._sampler.choose(logits, [numbers[place] for place in places], of_places(allowed, places), places)
        self._newest = chosen.tokens
        if compat.on_cpu():
            return chosen._replace(parts=iter(self._on_the_way()))
        mx.async_eval(chosen.arrays(), self._sampler.state())  # type: ignore[no-untyped-call]
        return chosen

    def _on_the_way(self) -> list[Any]:
        """Keys that layers between the parts of a step add: they are there when the layers in front are done."""
        return [self._layers[number].newest_key for number in between_parts(len(self._layers))]

    def _read(self, caches: Iterable[RowCache]) -> None:
        """Let rows read what they were given, short prompts together."""
        with explained_memory():
            for group in side_by_side([cache for cache in caches if cache.unread]):
                self._read_together(group)
                mx.async_eval([layer.arrays() for cache in group for layer in cache.layers])  # type: ignore[no-untyped-call]

    def _read_together(self, group: Sequence[RowCache]) -> Any:
        """One pass for some rows, the shorter parts padded in front: hidden states [rows, D] of their last tokens."""
        longest = max(len(cache.unread) for cache in group)
        layers = group[0].layers
        if len(group) > 1:
            pasts, padding = [cache.rows[0] for cache in group], [longest - len(cache.unread) for cache in group]
            rows = RowLengths(pasts, padding)
            layers = self._new_layers(rows)
            for number, layer in enumerate(layers):
                layer.begin_with([cache.layers[number] for cache in group])
        tokens = [[0] * (longest - len(cache.unread)) + cache.unread for cache in group]
        self._model.use(self._model.updates([cache.adapter for cache in group]))
        ends = self._ends(mx.array(tokens, mx.int32), layers)
        for row, cache in enumerate(group):
            if len(group) > 1:
                for mine, theirs in zip(cache.layers, layers, strict=True):
                    mine.take(theirs, row, len(cache.unread))
            cache.rows.advance(len(cache.unread))
            cache.unread.clear()
        return ends

    def _ends(self, tokens: Any, layers: Sequence[LayerCache]) -> Any:
        """Hidden states [rows, D] of the last of tokens [rows, T]."""
        with undifferentiated():
            return self._model.base.split.body(tokens, cache=layers)[:, -1]

    def copy(self, index: int) -> RowCache:
        row = self._rows[index]
        if row.cache is not None:
            return row.cache
        slot = self._slots.index(row)
        rows = RowLengths([self._lengths[slot]])
        layers = [layer.copied(slot, rows) for layer in self._layers]
        mx.async_eval([layer.arrays() for layer in layers])  # type: ignore[no-untyped-call]
        return RowCache(row.adapter, rows, layers)

    def size(self, cache: RowCache) -> CacheSize:
        if not self._token_bytes:
            self._read([cache])
        if cache.unread:
            size = cache.length * self._token_bytes
        else:
            size = sum(layer.nbytes for layer in cache.layers)
            self._token_bytes = size // max(1, cache.length)
        whole = all(window is None or cache.length < window for window in self._windows)
        return CacheSize(size, 0 if whole else cache.length)


def side_by_side(caches: Sequence[RowCache]) -> Iterator[list[RowCache]]:
    """Which rows read together: short parts of like lengths behind short pasts; every other one reads alone."""
    group: list[RowCache] = []
    for cache in sorted(caches, key=lambda cache: len(cache.unread)):
        if not _pads([*group, cache]):
            if group:
                yield group
            group = []
        group.append(cache)
    if group:
        yield group


def _pads(group: Sequence[RowCache]) -> bool:
    """Whether padding rows to one length costs less than reading them one by one."""
    parts = [len(cache.unread) for cache in group]
    past = max(cache.rows[0] for cache in group)
    bounded = past == 0 or all(cache.length < layer.window for cache in group for layer in cache.layers if layer.window)
    fits = max(parts) <= _SHORT and len(group) * past <= _MOST_PAST and bounded
    return len(group) == 1 or (fits and len(group) * max(parts) <= _MOST_PADDED * sum(parts))

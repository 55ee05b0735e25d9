"""Attention of one step of decoding: tokens of many requests end to end, each over the keys of its own request.

A request that has read its prompt contributes one token, and those that share a cache are attended to together. One
that reads its prompt contributes a chunk of it, and is attended to alone. Keys and values go into the caches on the
way, so the model itself is called without a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from finetune.engines.torch.blocks import Plan, Rule, attend_documents
from finetune.engines.torch.cache import Cache, CachedRow
from finetune.engines.torch.products import attend, attend_masked


class Heads(NamedTuple):
    """What one layer's attention gets for some tokens, or for all of a step."""

    query: Tensor  # [N, H, D]
    key: Tensor  # [N, G, D]
    value: Tensor  # [N, G, D]

    def part(self, start: int, tokens: int) -> "Heads":
        """Those of some tokens."""
        return Heads(*(tensor[start : start + tokens] for tensor in self))


class Part(Protocol):
    """Some tokens of a step whose attention is computed together."""

    @property
    def tokens(self) -> int:
        """How many."""
        ...

    def attend(self, layer: int, heads: Heads, rule: Rule) -> Tensor:
        """Remember keys and values, and attend: [tokens, H, D]."""
        ...

    def advance(self) -> None:
        """All layers have remembered the tokens."""
        ...


class Chunk:
    """The next tokens of one prompt."""

    def __init__(self, row: CachedRow, tokens: int) -> None:
        self.row = row
        self.tokens = tokens

    def attend(self, layer: int, heads: Heads, rule: Rule) -> Tensor:
        row, end = self.row, self.row.length + self.tokens
        query, key, value = (tensor.transpose(0, 1) for tensor in heads)
        keys, values = (tensor[row.slot] for tensor in row.cache.layer(layer, key, value))
        keys[:, row.length : end] = key
        values[:, row.length : end] = value
        if row.length == 0 and query.device.type == "cpu" and query.dtype == torch.bfloat16:
            return attend_documents(*heads, Plan((self.tokens,), rule))  # the fused attention is slower in bfloat16
        first = 0 if rule.window is None else max(0, row.length + 1 - rule.window)
        seen = slice(first, end)
        return attend(query[None], keys[None, :, seen], values[None, :, seen], None, rule)[0].transpose(0, 1)

    def advance(self) -> None:
        self.row.length += self.tokens


class NewestTokens:
    """One token of each row of a cache, in the order of its slots."""

    def __init__(self, cache: Cache, device: torch.device) -> None:
        lengths = [row.length + 1 for row in cache.rows]
        self.tokens = len(lengths)
        self._cache = cache
        self._shortest, self._longest = min(lengths), max(lengths)
        self._lengths = torch.tensor(lengths, device=device)
        self._slots = torch.arange(self.tokens, device=device)
        self._masks: dict[int | None, Tensor | None] = {}  # by window

    def attend(self, layer: int, heads: Heads, rule: Rule) -> Tensor:
        query, key, value = heads
        keys, values = self._cache.layer(layer, key.transpose(0, 1), value.transpose(0, 1))
        place = self._lengths - 1
        keys[self._slots, :, place] = key
        values[self._slots, :, place] = value
        seen = slice(self._first(rule.window), self._longest)
        grouped = query.view(self.tokens, key.shape[1], -1, query.shape[2])  # heads that share keys are its queries
        mask = self._mask(rule.window)
        output = attend_masked(grouped, keys[: self.tokens, :, seen], values[: self.tokens, :, seen], mask, rule)
        return output.view(query.shape)

    def advance(self) -> None:
        for row in self._cache.rows:
            row.length += 1

    def _first(self, window: int | None) -> int:
        return 0 if window is None else max(0, self._shortest - window)

    def _mask(self, window: int | None) -> Tensor | None:
        """[tokens, 1, 1, keys], True where a row has a key and sees it; None where all rows see all keys."""
        if window not in self._masks:
            self._masks[window] = self._made_mask(window)
        return self._masks[window]

    def _made_mask(self, window: int | None) -> Tensor | None:
        if self._shortest == self._longest:
            return None
        behind = self._lengths[:, None] - torch.arange(self._first(window), self._longest, device=self._lengths.device)
        seen = behind > 0
        return (seen if window is None else seen & (behind <= window))[:, None, None]


@dataclass(slots=True)
class RaggedRows:
    """The parts of a step in the order of their tokens."""

    parts: Sequence[Part]
    before: Callable[[int], None]  # called with the number of each layer before it attends

    def attend(self, layer: int, heads: Heads, rule: Rule) -> Tensor:
        """[N, H, D]."""
        self.before(layer)
        outputs, start = [], 0
        for part in self.parts:
            outputs.append(part.attend(layer, heads.part(start, part.tokens), rule))
            start += part.tokens
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

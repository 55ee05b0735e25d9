"""Causal attention of many documents on a CPU, as matrix products over blocks of queries.

PyTorch's fused attention for CPUs reaches an eighth of the matrix-product rate in bfloat16. Here a block of queries
meets the keys up to its end in one batched product, so that about half of the square is never computed, and the
heads that share a key are rows of the same product, so that keys and values are not repeated. Nothing but queries,
keys and values is kept for the backward pass: memory is linear in the tokens.

Scores are rounded to the type of the queries. Their size, and so the error, is kept small by subtracting the mean
key from all keys, which changes no weight (Zhang et al. 2024, SageAttention, section 3.2).
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BLOCK = 128  # queries: more waste above the diagonal, fewer make slow products
_FINEST = 32  # tokens between padded lengths: whole vectors, and few shapes that a kernel is made for


class Rule(NamedTuple):
    """How a layer turns queries and keys into weights."""

    scale: float
    window: int | None  # keys that a query sees, itself included
    softcap: float | None  # scores are softcap * tanh(scores / softcap)


class Span(NamedTuple):
    """One document within the batch."""

    start: int
    length: int


class Group(NamedTuple):
    """Documents computed together, padded at the right to one length: causal attention does not see that far."""

    spans: tuple[Span, ...]
    length: int

    def take(self, tokens: Tensor, groups: int) -> Tensor:
        """[N, heads, D] -> [documents x groups, length x heads / groups, D]; heads of a group lie side by side."""
        _, heads, width = tokens.shape
        taken = tokens.new_empty(len(self.spans), groups, self.length, heads // groups, width)
        for place, (start, length) in zip(taken, self.spans, strict=True):
            place[:, :length] = tokens[start : start + length].view(length, groups, -1, width).transpose(0, 1)
            place[:, length:] = 0
        return taken.view(len(self.spans) * groups, -1, width)

    def put(self, taken: Tensor, tokens: Tensor) -> None:
        """The inverse of `take`, into `tokens`."""
        _, heads, width = tokens.shape
        places = taken.view(len(self.spans), -1, self.length, heads * len(self.spans) // len(taken), width)
        for place, (start, length) in zip(places, self.spans, strict=True):
            into = tokens[start : start + length].view(length, -1, place.shape[2], width)
            into.copy_(place[:, :length].transpose(0, 1))


@lru_cache(maxsize=32)
def groups_of(lengths: tuple[int, ...]) -> tuple[Group, ...]:
    """Long documents alone; short ones together with those of about their length."""
    groups: dict[tuple[int, int], list[Span]] = {}
    for number, (length, end) in enumerate(zip(lengths, accumulate(lengths), strict=True)):
        padded = -(-length // _FINEST) * _FINEST
        groups.setdefault((padded, 0 if padded <= _BLOCK else number), []).append(Span(end - length, length))
    return tuple(Group(tuple(spans), length) for (length, _), spans in groups.items())


class Block(NamedTuple):
    """Queries [start, end) of each document of a group and the keys [first, end) that they see."""

    first: int
    start: int
    end: int

    def queries(self, tensor: Tensor, rows: int) -> Tensor:
        """The block's part of [groups, length x rows, D]."""
        return tensor[:, self.start * rows : self.end * rows]

    def keys(self, tensor: Tensor) -> Tensor:
        """The block's part of [groups, length, D]."""
        return tensor[:, self.first : self.end]


def _blocks(length: int, window: int | None) -> Iterator[Block]:
    for start in range(0, length, _BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        yield Block(first, start, min(length, start + _BLOCK))


@lru_cache(maxsize=64)
def _hidden_keys(block: Block, rows: int, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor]:
    """(first column, [queries x rows, columns]): -inf where a key comes after the query or before its window."""
    outside = block.first < block.start - 1 and window is not None and block.end - block.first > window
    column = block.first if outside else block.start
    behind = torch.arange(block.start, block.end)[:, None] - torch.arange(column, block.end)
    hidden = behind < 0
    if window is not None:
        hidden |= behind >= window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return column - block.first, mask.repeat_interleave(rows, dim=0)


class _Scored(NamedTuple):
    weights: Tensor  # [groups, queries x rows, keys]
    capped: Tensor | None  # tanh(scores / softcap)


def _score(query: Tensor, key: Tensor, block: Block, rule: Rule) -> _Scored:
    """Attention weights of scaled queries [groups, queries x rows, D] over keys [groups, keys, D]."""
    scores = torch.bmm(query, key.transpose(1, 2))
    capped = None
    if rule.softcap is not None:
        capped = scores.div_(rule.softcap).tanh_()
        scores = capped * rule.softcap
    rows = query.shape[1] // (block.end - block.start)
    column, hidden = _hidden_keys(block, rows, rule.window, scores.dtype)
    scores[:, :, column:].add_(hidden)
    return _Scored(torch.softmax(scores, dim=-1), capped)


class Plan(NamedTuple):
    """Which documents there are, and how each is attended to."""

    lengths: tuple[int, ...]
    rule: Rule


class _Attention(torch.autograd.Function):
    """Queries [N, H, D], keys and values [N, G, D] -> [N, H, D]; recomputes the weights in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
        lengths, rule = plan
        output = torch.empty(query.shape, dtype=query.dtype)
        centred = key if rule.softcap is not None else key - key.mean(dim=0)
        ctx.save_for_backward(query, centred, value)
        ctx.lengths, ctx.rule = lengths, rule
        heads, groups = query.shape[1], key.shape[1]
        for group in groups_of(lengths):
            q = group.take(query, groups).mul(rule.scale)
            k, v = group.take(centred, groups), group.take(value, groups)
            result = torch.empty_like(q)
            for block in _blocks(group.length, rule.window):
                weights = _score(block.queries(q, heads // groups), block.keys(k), block, rule).weights
                torch.bmm(weights, block.keys(v), out=block.queries(result, heads // groups))
            group.put(result, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, rule = ctx.saved_tensors, ctx.rule
        into = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in saved]
        groups = saved[1].shape[1]
        for group in groups_of(ctx.lengths):
            q, k, v, g = (group.take(tensor, groups) for tensor in (*saved, gradient))
            parts = _gradients(_Taken(q * rule.scale, k, v), g, group.length, rule)
            for part, tensor in zip(parts, into, strict=True):
                group.put(part, tensor)
        return (*into, None)


class _Taken(NamedTuple):
    """One group's scaled queries, keys and values."""

    query: Tensor  # [groups, length x rows, D]
    key: Tensor  # [groups, length, D]
    value: Tensor  # [groups, length, D]


def _gradients(taken: _Taken, gradient: Tensor, length: int, rule: Rule) -> _Taken:
    """Gradients of one group's unscaled queries, keys and values; those of keys and values add up in float32."""
    query, key, value = taken
    into_query = torch.empty_like(query)
    into_key, into_value = (torch.zeros(tensor.shape) for tensor in (key, value))
    rows = query.shape[1] // length
    for block in _blocks(length, rule.window):
        q, g = block.queries(query, rows), block.queries(gradient, rows)
        k, v = block.keys(key), block.keys(value)
        weights, capped = _score(q, k, block, rule)
        block.keys(into_value).add_(torch.bmm(weights.transpose(1, 2), g))
        into_weights = torch.bmm(g, v.transpose(1, 2))
        into_scores = torch._softmax_backward_data(into_weights, weights, -1, weights.dtype)
        if capped is not None:
            into_scores.mul_(1 - capped.square_())
        torch.bmm(into_scores, k, out=block.queries(into_query, rows))
        block.keys(into_key).add_(torch.bmm(into_scores.transpose(1, 2), q))
    return _Taken(into_query.mul_(rule.scale), into_key.to(key.dtype), into_value.to(value.dtype))


def attend_documents(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
    """Queries [N, H, D] of documents end to end, keys and values [N, G, D] with H a multiple of G: [N, H, D]."""
    result: Tensor = _Attention.apply(query, key, value, plan)  # type: ignore[no-untyped-call]
    return result

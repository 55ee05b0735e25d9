"""Causal attention within each document of a row, with the gradient that goes with it.

On the CPU, queries go a block at a time and meet only the keys up to their end: half of the scores of a long
document are never computed, nor any between documents. With E = exp(S - max S) and t = sum E, the forward pass
gives O = (E V) / t, and with G = dO / t the backward pass

    dV = E^T G        dS = E * (G V^T - sum(G * O))        dQ = scale dS K        dK = scale dS^T Q

E is kept for short documents and computed again, from log(sum exp S), for long ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from finetune.engines.mlx.documents import Documents
from finetune.engines.mlx.exponential import exp, is_fast
from finetune.engines.mlx.untraced import untraced

_QUERIES = 128
_KEPT = 512  # tokens of a document whose probabilities are kept: up to a fifth of its activations
_HIDDEN = -1e30  # a score whose exp is 0


def attend(queries: Any, keys: Any, values: Any, *, scale: float, documents: Documents) -> Any:
    """Attention of queries [B, H, N, D] to keys and values [B, G, N, D], H a multiple of G: [B, H, N, D]."""
    if not is_fast(queries.dtype):
        return _by_library(queries, keys, values, scale, documents)
    batch, heads, length, width = queries.shape
    groups = keys.shape[1]
    grouped = (queries * scale).reshape(batch, groups, heads // groups, length, width)
    blocks = list(_blocks(documents))
    found: Any = _attention(blocks)(grouped, mx.contiguous(keys), mx.contiguous(values))
    return found[0].reshape(queries.shape)


def _by_library(queries: Any, keys: Any, values: Any, scale: float, documents: Documents) -> Any:
    parts = []
    for start, end in documents.spans():
        q, k, v = (array[:, :, start:end] for array in (queries, keys, values))
        mask: Any = "causal"
        if documents.window is not None and documents.window < end - start:
            mask = _band(end - start, end - start, documents.window) == 0.0
        parts.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask))
    return mx.concatenate(parts, axis=2)


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries start..end of a row, and the keys first..end that they see; `kept`: whether E is."""

    first: int
    start: int
    end: int
    window: int | None
    kept: bool

    def queries(self, grouped: Any) -> Any:
        """[B, G, R, N, D] -> [B, G, R x rows, D]: heads that share keys are rows of one product."""
        part = grouped[:, :, :, self.start : self.end]
        return part.reshape(*part.shape[:2], -1, part.shape[-1])

    def keys(self, array: Any) -> Any:
        """[B, G, N, D] -> [B, G, keys, D]."""
        return array[:, :, self.first : self.end]

    def scores(self, queries: Any, keys: Any) -> Any:
        """[B, G, R x rows, keys], hidden ones at _HIDDEN."""
        rows, columns = self.end - self.start, self.end - self.first
        scores = queries @ keys.swapaxes(-1, -2)
        apart = scores.reshape(*scores.shape[:2], -1, rows, columns)
        size = 1 << (columns - 1).bit_length()
        return (apart + _band(_QUERIES, size, self.window)[-rows:, -columns:]).reshape(scores.shape)


def _blocks(documents: Documents) -> Iterator[_Block]:
    for begin, finish in documents.spans():
        for start in range(begin, finish, _QUERIES):
            first = begin if documents.window is None else max(begin, start - documents.window + 1)
            end = min(start + _QUERIES, finish)
            yield _Block(first, start, end, documents.window, kept=finish - begin <= _KEPT)


@lru_cache(maxsize=16)
def _band(rows: int, columns: int, window: int | None) -> Any:
    """What is added to scores, for queries and keys that end together: 0 where the key is seen."""
    distance = np.arange(rows)[::-1][:, None] * -1 + np.arange(columns)[::-1]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return mx.array(np.where(seen, 0.0, _HIDDEN).astype(np.float32))


def _attention(blocks: Sequence[_Block]) -> Any:
    """A differentiable (scaled queries [B, G, R, N, D], keys, values) -> (output like the queries, *what is kept)."""

    @mx.custom_function
    @untraced
    def forward(queries: Any, keys: Any, values: Any) -> tuple[Any, ...]:
        outputs, kept = [], []
        for block in blocks:
            q = block.queries(queries)
            scores = block.scores(q, block.keys(keys))
            largest = scores.max(axis=-1, keepdims=True)
            exponentials = exp(scores - largest)
            total = exponentials.sum(axis=-1, keepdims=True)
            outputs.append(_ungrouped((exponentials @ block.keys(values)) / total, queries))
            kept += [exponentials, total] if block.kept else [largest + mx.log(total)]
        return (mx.concatenate(outputs, axis=3), *kept)

    @forward.vjp
    @untraced
    def backward(primals: Sequence[Any], cotangents: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
        queries, keys, values = primals
        kept = iter(outputs[1:])
        parts = []
        key_gradients, value_gradients = _RunningSum(), _RunningSum()
        for block in blocks:
            q, k, v = block.queries(queries), block.keys(keys), block.keys(values)
            exponentials, scaled = next(kept), block.queries(cotangents[0])
            if block.kept:
                scaled = scaled / next(kept)
            else:
                exponentials = exp(block.scores(q, k) - exponentials)
            drift = (scaled * block.queries(outputs[0])).sum(axis=-1, keepdims=True)
            gradient = exponentials * (scaled @ v.swapaxes(-1, -2) - drift)
            parts.append(_ungrouped(gradient @ k, queries))
            key_gradients.add(block, gradient.swapaxes(-1, -2) @ q)
            value_gradients.add(block, exponentials.swapaxes(-1, -2) @ scaled)
        return mx.concatenate(parts, axis=3), key_gradients.total(), value_gradients.total()

    return forward


def _ungrouped(rows: Any, like: Any) -> Any:
    """[B, G, R x rows, D] -> [B, G, R, rows, D]."""
    return rows.reshape(*like.shape[:3], -1, like.shape[-1])


class _RunningSum:
    """Sum of pieces [B, G, first..end, D] whose starts and ends do not decrease, over the whole row."""

    def __init__(self) -> None:
        self._done: list[Any] = []
        self._open: Any = None
        self._first = 0

    def add(self, block: _Block, piece: Any) -> None:
        if self._open is None:
            self._open, self._first = piece, block.first
            return
        ready = block.first - self._first
        if ready:
            self._done.append(self._open[:, :, :ready])
            self._open = self._open[:, :, ready:]
            self._first = block.first
        shared = self._open.shape[2]
        new = piece[:, :, shared:]
        self._open = mx.concatenate([self._open + piece[:, :, :shared], new], axis=2) if shared else new

    def total(self) -> Any:
        return mx.concatenate([*self._done, self._open], axis=2)

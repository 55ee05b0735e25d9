"""Causal attention within each document of a row."""

from typing import Any

import mlx.core as mx

from finetune.engines.mlx.documents import Documents


def attend(queries: Any, keys: Any, values: Any, *, scale: float, documents: Documents) -> Any:
    """Attention of queries [B, H, N, D] to keys and values [B, G, N, D], H a multiple of G: [B, H, N, D]."""
    parts = []
    for start, end in documents.spans():
        q, k, v = (array[:, :, start:end] for array in (queries, keys, values))
        parts.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=_mask(end - start, documents)))
    return mx.concatenate(parts, axis=2)


def _mask(length: int, documents: Documents) -> Any:
    if documents.window is None or documents.window >= length:
        return "causal"
    distance = mx.arange(length)[:, None] - mx.arange(length)
    return (distance >= 0) & (distance < documents.window)

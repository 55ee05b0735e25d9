"""Causal attention for transformers' models, document by document, with keys as long as a cache makes them.

`register` makes it known to transformers as the implementation "finetune". Documents reach it as the keyword
argument `documents` of the model's call; without them a row is one text whose last queries meet the last keys,
which is what decoding with a cache needs. Dropout of attention weights is not applied: the engine keeps models
in evaluation mode, as the MLX engine has none either.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from finetune.engines.torch.blocks import Plan, Rule, attend_documents
from finetune.engines.torch.documents import Documents

NAME = "finetune"


def register() -> str:
    """Make the attention known to transformers; returns what goes into `attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None, as attention knows what is causal; a mask only where a caller marks padding."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries [B, H, T, D] over keys and values [B, G, S, D] with H a multiple of G: [B, T, H, D], and no weights."""
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if documents is None:
        output = _attend(query, key, value, attention_mask, rule)
    elif query.device.type == "cpu" and query.dtype == torch.bfloat16:  # in float32 the fused attention is faster
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        return attend_documents(q, k, v, Plan(documents.lengths, rule))[None], None
    else:
        parts = [torch.split(part, list(documents.lengths), dim=2) for part in (query, key, value)]
        output = torch.cat([_attend(q, k, v, None, rule) for q, k, v in zip(*parts, strict=True)], dim=2)
    return output.transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Attention of one text: causal, the last query at the last key, unless a mask says otherwise."""
    queries, keys = query.shape[2], key.shape[2]
    windowed = rule.window is not None and keys > rule.window
    if mask is None and (windowed or rule.softcap is not None or 1 < queries < keys):
        mask = _causal_mask(queries, keys, rule.window if windowed else None, query.device)
    if rule.softcap is not None:
        return _soft_capped(query, key, value, mask, rule)
    gqa = key.shape[1] != query.shape[1]
    causal = mask is None and queries > 1
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=rule.scale, enable_gqa=gqa)


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys], True where a query sees a key."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def _soft_capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    cap = rule.softcap or 1.0
    scores = cap * torch.tanh((query @ key.transpose(-1, -2)) * (rule.scale / cap))
    if mask is not None:  # -inf would make NaN of a row of padding
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return weights @ value

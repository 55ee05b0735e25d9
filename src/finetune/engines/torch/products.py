"""Scaled dot-product attention of one text, or of several of one length, with or without a soft cap."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune.engines.torch.blocks import Rule


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Queries [B, H, T, D] over keys and values [B, G, S, D] with H a multiple of G: [B, H, T, D].

    Causal, the last query at the last key, unless a mask (True where a query sees a key) says otherwise.
    """
    queries, keys = query.shape[2], key.shape[2]
    windowed = rule.window is not None and keys > rule.window
    if mask is None and (windowed or rule.softcap is not None or 1 < queries < keys):
        mask = _causal_mask(queries, keys, rule.window if windowed else None, query.device)
    return attend_masked(query, key, value, mask, rule, causal=mask is None and queries > 1)


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule, *, causal: bool = False
) -> Tensor:
    """The same over the keys that a mask leaves, over all without one, or with `causal` over those up to the query."""
    if rule.softcap is not None:
        return _soft_capped(query, key, value, mask, rule)
    gqa = key.shape[1] != query.shape[1]
    if query.shape[2] == 1 and not gqa and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return _one_query(query, key, value, mask, rule.scale)
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=rule.scale, enable_gqa=gqa)


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Half the time of the fused attention for CPUs in bfloat16. Scores are float32: keys may share a large offset."""
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


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

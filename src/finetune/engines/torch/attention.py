"""Causal attention for transformers' models: document by document, or token by token over what requests have read.

`register` makes it known to transformers as the implementation "finetune". What there is to attend to reaches it as
a keyword argument of the model's call: `documents` in training and scoring, `rows` in decoding. Dropout of attention
weights is not applied: the engine keeps models in evaluation mode, as the MLX engine has none either.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from finetune.engines.torch.blocks import Plan, Rule, attend_documents
from finetune.engines.torch.documents import Documents
from finetune.engines.torch.products import attend
from finetune.engines.torch.ragged import Heads, RaggedRows

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
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    rows: RaggedRows | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries [B, H, T, D] over keys and values [B, G, S, D] with H a multiple of G: [B, T, H, D], and no weights."""
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    if rows is not None:
        return rows.attend(module.layer_idx, _by_token(query, key, value), rule)[None], None
    if documents is None:
        return attend(query, key, value, attention_mask, rule).transpose(1, 2), None
    fused = query.dtype != torch.bfloat16 and softcap is None  # PyTorch's own has no cap, and is slow in 16 bits
    if query.device.type == "cpu" and not fused:
        return attend_documents(*_by_token(query, key, value), Plan(documents.lengths, rule))[None], None
    parts = [torch.split(part, list(documents.lengths), dim=2) for part in (query, key, value)]
    output = torch.cat([attend(q, k, v, None, rule) for q, k, v in zip(*parts, strict=True)], dim=2)
    return output.transpose(1, 2), None


def _by_token(query: Tensor, key: Tensor, value: Tensor) -> Heads:
    """[1, heads, N, D] -> [N, heads, D]."""
    return Heads(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))

"""Chooses the next token of one request from its logits, on the device.

The random key is a function of the request's seed and the token's number, so the same seed gives the same tokens
whatever else is running.
"""

from typing import Any

import mlx.core as mx

from finetune.core.types import Sampling

_SEED_BITS = 0xFFFFFFFF


def sample(logits: Any, sampling: Sampling, *, number: int, seen: Any | None) -> tuple[Any, Any]:
    """(token, its log-probability in nats under the unmodified distribution) from logits [V].

    `number` counts the request's tokens from 0; `seen` is a bool [V], needed where there is a repetition penalty.
    Order: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p, min-p.
    """
    logits = logits.astype(mx.float32)
    scores = logits if seen is None else _penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = mx.argmax(scores)
    else:
        key = mx.random.key(((sampling.seed & _SEED_BITS) << 32) | number)
        token = mx.random.categorical(_filtered(scores / sampling.temperature, sampling), key=key)
    return token, logits[token] - mx.logsumexp(logits)


def _penalise(logits: Any, seen: Any, penalty: float) -> Any:
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(scores: Any, sampling: Sampling) -> Any:
    """Scores with the tokens that the filters leave out at minus infinity; the best token always stays."""
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = mx.where(scores >= mx.topk(scores, sampling.top_k).min(), scores, -mx.inf)
    if sampling.top_p < 1.0:
        order = mx.argsort(-scores)
        probabilities = mx.softmax(scores)[order]
        before = mx.cumsum(probabilities) - probabilities  # mass of the more probable tokens
        kept = mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), order, before < sampling.top_p, axis=-1)
        scores = mx.where(kept, scores, -mx.inf)
    if sampling.min_p > 0.0:
        scores = mx.where(scores >= scores.max() + mx.log(mx.array(sampling.min_p)), scores, -mx.inf)
    return scores

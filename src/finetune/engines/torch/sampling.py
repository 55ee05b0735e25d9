"""Chooses the next token of one request from its logits, on the device.

The random numbers are a function of the request's seed and the token's number, so the same seed gives the same tokens
whatever else is running.
"""

import math

import numpy as np
import torch
from torch import Tensor

from finetune.core.types import Sampling

_SEED_BITS = 0xFFFFFFFF


def sample(logits: Tensor, sampling: Sampling, *, number: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """(token, its log-probability in nats under the unmodified distribution) from logits [V].

    `number` counts the request's tokens from 0; `seen` is a bool [V], needed where there is a repetition penalty.
    Order: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    scores = logits if seen is None else _penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = scores.argmax()
    else:
        token = _drawn(_filtered(scores / sampling.temperature, sampling), sampling.seed, number)
    return token, logits[token] - logits.logsumexp(dim=0)


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores with the tokens that the filters leave out at minus infinity; the best token always stays."""
    if 0 < sampling.top_k < scores.shape[0]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1.0:
        ordered, order = torch.softmax(scores, dim=0).sort(descending=True, stable=True)
        before = ordered.cumsum(dim=0) - ordered  # mass of the more probable tokens
        scores = scores.index_fill(0, order[before >= sampling.top_p], -math.inf)
    if sampling.min_p > 0.0:
        scores = scores.masked_fill(scores < scores.max() + math.log(sampling.min_p), -math.inf)
    return scores


def _drawn(scores: Tensor, seed: int, number: int) -> Tensor:
    """One token from softmax(scores): the first to arrive, where a token's rate is its probability."""
    mixed = np.random.SeedSequence([seed & _SEED_BITS, number]).generate_state(1, np.uint32)
    generator = torch.Generator(scores.device).manual_seed(int(mixed[0]))
    arrival = torch.empty_like(scores).exponential_(generator=generator)
    return (torch.softmax(scores, dim=0) / arrival).argmax()

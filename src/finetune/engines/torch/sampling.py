"""Chooses the next token of every row of a batch from its logits, on the device.

A draw is a function of the row's probabilities, its seed and the number of its token: other rows, and whether they
filter, make no difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.core.types import BoolArray, GenerationRequest, Sampling
from finetune.engines import sampling as wanted
from finetune.engines.continuous import Choice
from finetune.engines.sampling import Draws

CANDIDATES = 1024  # best tokens among which top-k and top-p mostly end: sorting a whole vocabulary takes far longer


@dataclass(slots=True)
class Spoken:
    """What a row has said, for penalties."""

    seen: Tensor  # [V] bool: in the prompt or the answer
    counts: Tensor  # [V] float32: how often in the answer

    def add(self, token: int) -> None:
        """The answer grows."""
        self.seen[token] = True
        self.counts[token] += 1.0


def spoken_of(request: GenerationRequest, vocabulary: int, device: torch.device) -> Spoken | None:
    """The prompt; None where the row has no penalty."""
    if not wanted.is_penalised(request.sampling):
        return None
    seen = torch.from_numpy(wanted.prompt_tokens(request, vocabulary)).to(device)
    return Spoken(seen, torch.zeros(vocabulary, device=device))


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What choosing a row's next token takes besides its logits."""

    request: GenerationRequest
    number: int  # of the token within the answer, from 0
    spoken: Spoken | None = None

    @property
    def sampling(self) -> Sampling:
        """How it is chosen."""
        return self.request.sampling


def choose(logits: Tensor, rows: Sequence[SampledRow], allowed: Mapping[int, BoolArray] | None = None) -> list[Choice]:
    """The next token of each row from logits [R, V]; `allowed` [V] for the rows with a constraint.

    Log-probabilities are in nats under the unmodified distribution.
    """
    logits = logits.float()
    scores = _penalised(_biased(logits, rows, allowed), rows)
    tokens = scores.argmax(dim=1)
    draws = wanted.draws_of([row.sampling for row in rows])
    if len(draws.rows):
        index = torch.from_numpy(draws.rows).long().to(logits.device)
        tokens[index] = _drawn(scores[index], draws, [rows[row].number for row in draws.rows])
    return _choices(logits, tokens, rows)


def _choices(logits: Tensor, tokens: Tensor, rows: Sequence[SampledRow]) -> list[Choice]:
    total = logits.logsumexp(dim=1, keepdim=True)
    logprobs = (logits.gather(1, tokens[:, None]) - total)[:, 0].tolist()
    listed = max(row.request.top_logprobs for row in rows)
    tops = _top(logits, total, listed) if listed else [()] * len(rows)
    return [
        Choice(token, logprob, top[: row.request.top_logprobs])
        for token, logprob, top, row in zip(tokens.tolist(), logprobs, tops, rows, strict=True)
    ]


def _top(logits: Tensor, total: Tensor, number: int) -> list[tuple[tuple[int, float], ...]]:
    best = logits.topk(min(number, logits.shape[1]), dim=1)
    pairs = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
    return [tuple(zip(tokens, logprobs, strict=True)) for tokens, logprobs in pairs]


def _biased(logits: Tensor, rows: Sequence[SampledRow], allowed: Mapping[int, BoolArray] | None) -> Tensor:
    bias = wanted.bias_of([row.sampling for row in rows], logits.shape[1], allowed)
    return logits if bias is None else logits + torch.from_numpy(bias).to(logits.device)


def _penalised(scores: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """Repetition divides a positive score of what was said and multiplies a negative one; the others are taken off."""
    if all(row.spoken is None for row in rows):
        return scores
    scores = scores.clone()
    for score, row in zip(scores, rows, strict=True):
        if row.spoken is not None:
            said, sampling = row.spoken, row.sampling
            factor = torch.where(score > 0, 1.0 / sampling.repetition_penalty, sampling.repetition_penalty)
            score.mul_(torch.where(said.seen, factor, 1.0))
            score.sub_(said.counts, alpha=sampling.frequency_penalty)
            score.sub_((said.counts > 0).float(), alpha=sampling.presence_penalty)
    return scores


def _drawn(scores: Tensor, draws: Draws, numbers: Sequence[int]) -> Tensor:
    """One token a row [D] from softmax(scores): where the running sum of probabilities passes a random share."""
    precise = torch.float32 if scores.device.type == "mps" else torch.float64  # Metal has no float64
    sums = torch.softmax(_filtered(scores, draws), dim=1).cumsum(dim=1, dtype=precise)
    shares = [_share(int(seed), number) for seed, number in zip(draws.seeds, numbers, strict=True)]
    share = torch.tensor(shares, dtype=precise, device=scores.device).clamp_(max=1.0 - torch.finfo(precise).eps)
    return torch.searchsorted(sums, sums[:, -1:] * share[:, None], right=True)[:, 0]


def _share(seed: int, number: int) -> float:
    """A random number in [0, 1) of a row's seed and its token's number."""
    return float(np.random.Generator(np.random.PCG64([seed & wanted.SEED_BITS, number])).random())


def _filtered(scores: Tensor, draws: Draws) -> Tensor:
    """Scores over the temperature, with what top-k, top-p and min-p leave out at minus infinity. The best one stays."""
    temperature, top_p, min_p = (
        torch.from_numpy(values)[:, None].to(scores.device) for values in (draws.temperature, draws.top_p, draws.min_p)
    )
    scores = scores / temperature
    if draws.filtered:
        top_k = torch.from_numpy(draws.top_k).long().clamp(max=scores.shape[1])[:, None].to(scores.device)
        scores = _nucleus(scores, top_k, top_p)
    least = scores.amax(dim=1, keepdim=True) + min_p.log()  # log 0 leaves all
    return scores.masked_fill(scores < least, -math.inf)


def _nucleus(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The best `top_k` [D, 1] of each row, and of these the fewest whose probabilities reach `top_p` [D, 1]."""
    count = min(CANDIDATES, scores.shape[1])
    best, order = scores.topk(count, dim=1)
    few = top_k <= count
    limited = best.masked_fill(few & (best < best.gather(1, top_k.clamp(max=count) - 1)), -math.inf)
    total = torch.where(few, limited.logsumexp(dim=1, keepdim=True), scores.logsumexp(dim=1, keepdim=True))
    probabilities = (limited - total).exp()
    sums = probabilities.cumsum(dim=1)
    kept = limited.masked_fill(sums - probabilities >= top_p, -math.inf)  # the mass of the more probable tokens
    found = torch.full_like(scores, -math.inf).scatter_(1, order, kept)
    beyond = (~few & (sums[:, -1:] < top_p)).squeeze(1).nonzero().squeeze(1)  # these rows go past the candidates
    if len(beyond):
        found[beyond] = _sorted_nucleus(scores[beyond], top_k[beyond], top_p[beyond])
    return found


def _sorted_nucleus(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The same for any distribution."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, top_k - 1), -math.inf)
    probabilities = torch.softmax(ordered, dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    return torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(before >= top_p, -math.inf))

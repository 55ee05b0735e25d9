"""Chooses the next tokens of all rows of a batch from their logits, on the device, in one graph.

What the stages are and in which order is said in `engines.sampling`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from finetune.core.types import BoolArray, GenerationRequest
from finetune.engines.continuous import Choice
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.exponential import exp, is_fast
from finetune.engines.sampling import Draws, Penalties, bias_of, draws_of, is_penalised, penalties_of, prompt_tokens


class Chosen(NamedTuple):
    """Tokens that the device is choosing for B rows. Implements `Choices`."""

    rows: Sequence[int]
    tokens: Any  # [B]
    logprobs: Any  # [B]
    top_tokens: Any | None  # [B, K], best first, for the row that asks for most
    top_logprobs: Any | None
    wanted: Sequence[int]  # how many of them each row asks for
    parts: Iterator[Any] = iter(())  # what is computed on the way to the tokens, a part at a time

    def done(self) -> bool:
        with explained_memory():
            part = next(self.parts, None)
            if part is not None:
                mx.eval(part)
            return part is None

    def result(self) -> list[Choice]:
        with explained_memory():
            chosen = zip(self.tokens.tolist(), self.logprobs.tolist(), self._tops(), strict=True)
            return [Choice(int(token), float(logprob), top) for token, logprob, top in chosen]

    def _tops(self) -> list[tuple[tuple[int, float], ...]]:
        if self.top_tokens is None or self.top_logprobs is None:
            return [()] * len(self.wanted)
        rows = zip(self.top_tokens.tolist(), self.top_logprobs.tolist(), self.wanted, strict=True)
        return [tuple(zip(tokens[:count], logprobs[:count], strict=True)) for tokens, logprobs, count in rows]

    def arrays(self) -> list[Any]:
        """What is to be computed."""
        return [array for array in self[1:5] if array is not None]


class RowSampler:
    """Sampling for the rows of a batch, which join and leave as those of the caches do."""

    def __init__(self, vocabulary: int, requests: Sequence[GenerationRequest] = ()) -> None:
        self._vocabulary = vocabulary
        self._requests = list(requests)
        self._said: Any | None = None  # [B, V], how often each row has chosen a token; only where there are penalties
        self._read: Any | None = None  # [B, V], True for the tokens of a row's prompt
        if any(is_penalised(request.sampling) for request in requests):
            self._said = mx.zeros((len(self._requests), vocabulary))
            self._read = mx.array(np.stack([prompt_tokens(request, vocabulary) for request in requests]))
        self._changed()

    def _changed(self) -> None:
        samplings = [request.sampling for request in self._requests]
        self._draws = draws_of(samplings)
        self._penalties = penalties_of(samplings)
        self._bias = bias_of(samplings, self._vocabulary)
        self._tops = [request.top_logprobs for request in self._requests]
        if self._penalties is None:
            self._said = self._read = None

    def extend(self, other: "RowSampler") -> None:
        """Add the rows of another sampler, with what they have said."""
        if self._said is not None or other._said is not None:
            said, read = zip(self._history(), other._history(), strict=True)
            self._said, self._read = mx.concatenate(list(said)), mx.concatenate(list(read))
        self._requests += other._requests
        self._changed()

    def _history(self) -> tuple[Any, Any]:
        """What the rows have said and read; without penalties nobody has looked."""
        if self._said is not None:
            return self._said, self._read
        shape = (len(self._requests), self._vocabulary)
        return mx.zeros(shape), mx.zeros(shape, mx.bool_)

    def leave(self, row: int) -> None:
        """The last row takes the place of another."""
        self._requests[row] = self._requests[-1]
        self._requests.pop()
        if self._said is not None and self._read is not None:
            order = mx.array(moved(len(self._requests) + 1, row), mx.int32)
            self._said, self._read = self._said[order], self._read[order]
        self._changed()

    def choose(
        self, logits: Any, numbers: Sequence[int], allowed: Mapping[int, BoolArray], rows: Sequence[int]
    ) -> Chosen:
        """The next tokens from logits [B, V]; `numbers` counts each row's tokens from 0.

        What is said of a row, by its place here, is handed on under its place in `rows`.
        """
        logits = logits.astype(mx.float32)
        scores = self._scores(logits, allowed)
        tokens = mx.argmax(scores, axis=-1)
        if len(self._draws.rows):
            drawn = draw(scores, self._draws, np.array(numbers)[self._draws.rows])
            tokens = (
                drawn
                if len(drawn) == len(tokens)
                else tokens.at[mx.array(self._draws.rows)].add(drawn - tokens[mx.array(self._draws.rows)])
            )
        if self._said is not None:
            self._said = self._said.at[mx.arange(len(tokens)), tokens].add(1.0)
        return self._chosen(logits, tokens, rows)

    def _scores(self, logits: Any, allowed: Mapping[int, BoolArray]) -> Any:
        """The logits as biases, penalties and constraints leave them."""
        bias = self._bias
        if allowed:
            bias = bias_of([request.sampling for request in self._requests], self._vocabulary, allowed)
        scores = logits if bias is None else logits + mx.array(bias)
        if self._penalties is not None:
            scores = penalised(scores, self._said, self._read, self._penalties)
        return scores

    def _chosen(self, logits: Any, tokens: Any, rows: Sequence[int]) -> Chosen:
        totals = _log_totals(logits)
        logprobs = (mx.take_along_axis(logits, tokens[:, None], axis=-1) - totals)[:, 0]
        most = max(self._tops, default=0)
        if not most:
            return Chosen(rows, tokens, logprobs, None, None, self._tops)
        best = mx.argpartition(-logits, kth=min(most, self._vocabulary) - 1, axis=-1)[:, :most]
        values = mx.take_along_axis(logits, best, axis=-1)
        order = mx.argsort(-values, axis=-1)
        top = mx.take_along_axis(best, order, axis=-1)
        return Chosen(rows, tokens, logprobs, top, mx.take_along_axis(values, order, axis=-1) - totals, self._tops)

    def state(self) -> list[Any]:
        """What the tokens under way change."""
        return [] if self._said is None else [self._said]


def _log_totals(logits: Any) -> Any:
    """log sum exp of each row [B, 1]."""
    if not is_fast(logits.dtype):
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    largest = logits.max(axis=-1, keepdims=True)
    return largest + mx.log(exp(logits - largest).sum(axis=-1, keepdims=True))


def moved(rows: int, left: int) -> list[int]:
    """Which of `rows` rows stand where after one has left and the last has taken its place."""
    order = list(range(rows - 1))
    if left < rows - 1:
        order[left] = rows - 1
    return order


def penalised(logits: Any, said: Any, read: Any, penalties: Penalties) -> Any:
    """Logits [B, V] lowered for tokens that were said (counts [B, V]), and, for repetition, read (bool [B, V])."""
    repetition, presence, frequency = (mx.array(values)[:, None] for values in penalties)
    lowered = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(read | (said > 0), lowered, logits)
    return logits - presence * (said > 0) - frequency * said


def draw(scores: Any, draws: Draws, numbers: Any) -> Any:
    """One token [D] for each drawing row of scores [B, V]: the number of a row's token and its seed decide."""
    every = len(draws.rows) == len(scores)
    scores = (scores if every else scores[mx.array(draws.rows)]) / mx.array(draws.temperature)[:, None]
    if draws.filtered:
        scores = _filtered(scores, draws)
    if draws.min_p.any():
        least = scores.max(axis=-1, keepdims=True) + mx.log(mx.array(draws.min_p))[:, None]
        scores = mx.where(scores >= least, scores, -mx.inf)
    keys = mx.array(np.stack([draws.seeds.view(np.uint32), numbers.astype(np.uint32)], axis=1))
    noise: Any = mx.vmap(lambda key: mx.random.gumbel((scores.shape[-1],), key=key))(keys)
    return mx.argmax(scores + noise, axis=-1)


def _filtered(scores: Any, draws: Draws) -> Any:
    """Scores with what top-k and top-p leave out at minus infinity; the best token always stays."""
    order = mx.argsort(-scores, axis=-1)
    ordered = mx.take_along_axis(scores, order, axis=-1)
    last = np.minimum(draws.top_k, scores.shape[-1]) - 1
    ordered = mx.where(ordered >= mx.take_along_axis(ordered, mx.array(last)[:, None], axis=-1), ordered, -mx.inf)
    probabilities = mx.softmax(ordered, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities  # mass of the more probable tokens
    kept = mx.where(before < mx.array(draws.top_p)[:, None], ordered, -mx.inf)
    return mx.put_along_axis(scores, order, kept, axis=-1)

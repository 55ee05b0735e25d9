"""What the rows of a batch ask of sampling, as arrays: an engine chooses all their tokens in one go.

The stages, in order: bias, repetition penalty (Keskar et al. 2019), presence and frequency penalties, the
constraint; then the best token, or with a temperature a draw after temperature, top-k, top-p and min-p. A row's
draw is a function of its seed and of the number of its token, whatever else is in the batch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from finetune.core.types import BoolArray, FloatArray, GenerationRequest, IntArray, Sampling

SEED_BITS = 0xFFFFFFFF
_UNLIMITED = np.iinfo(np.int32).max
_NO_TOP_P = 2.0  # 1.0 would cut a tail whose sum has been rounded to it


class Penalties(NamedTuple):
    """[R] each: how rows discourage what they have said."""

    repetition: FloatArray
    presence: FloatArray
    frequency: FloatArray


class Draws(NamedTuple):
    """The rows that draw, and how: [D] each."""

    rows: IntArray  # which of the batch
    temperature: FloatArray
    top_k: IntArray  # the largest number where there is no limit
    top_p: FloatArray
    min_p: FloatArray
    seeds: IntArray  # bits of uint32

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p leaves something out, for which tokens are sorted."""
        return bool((self.top_p <= 1.0).any() or (self.top_k < _UNLIMITED).any())


def draws_of(samplings: Sequence[Sampling]) -> Draws:
    """The rows whose temperature is not 0."""
    drawing = [(row, sampling) for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    chosen = [sampling for _, sampling in drawing]
    return Draws(
        rows=np.array([row for row, _ in drawing], np.int32),
        temperature=_floats([sampling.temperature for sampling in chosen]),
        top_k=np.array([sampling.top_k or _UNLIMITED for sampling in chosen], np.int32),
        top_p=_floats([sampling.top_p if sampling.top_p < 1.0 else _NO_TOP_P for sampling in chosen]),
        min_p=_floats([sampling.min_p for sampling in chosen]),
        seeds=np.array([sampling.seed & SEED_BITS for sampling in chosen], np.uint32).view(np.int32),
    )


def penalties_of(samplings: Sequence[Sampling]) -> Penalties | None:
    """None where no row has a penalty."""
    if not any(map(is_penalised, samplings)):
        return None
    return Penalties(
        _floats([sampling.repetition_penalty for sampling in samplings]),
        _floats([sampling.presence_penalty for sampling in samplings]),
        _floats([sampling.frequency_penalty for sampling in samplings]),
    )


def is_penalised(sampling: Sampling) -> bool:
    """Whether what the row has said matters."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def bias_of(
    samplings: Sequence[Sampling], vocabulary: int, allowed: Mapping[int, BoolArray] | None = None
) -> FloatArray | None:
    """[R, V], what is added to logits: biases, and minus infinity where a row's constraint forbids; None for nothing.

    A constraint that knows fewer tokens than the model has logits forbids the rest.
    """
    allowed = allowed or {}
    if not allowed and not any(sampling.logit_bias for sampling in samplings):
        return None
    bias = np.zeros((len(samplings), vocabulary), np.float32)
    for row, sampling in enumerate(samplings):
        for token, value in sampling.logit_bias:
            bias[row, token] += value
    for row, mask in allowed.items():
        bias[row, np.flatnonzero(~mask[:vocabulary])] = -np.inf
        bias[row, len(mask) :] = -np.inf
    return bias


def prompt_tokens(request: GenerationRequest, vocabulary: int) -> BoolArray:
    """[V], True for the tokens of the prompt."""
    seen = np.zeros(vocabulary, np.bool_)
    seen[list(request.prompt)] = True
    return seen


def _floats(values: Sequence[float]) -> FloatArray:
    return np.array(values, np.float32)

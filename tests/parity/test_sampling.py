"""Which tokens each filter leaves, against probabilities worked out by hand, on both engines."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import pytest
import torch

from finetune.core.types import GenerationRequest, Sampling
from finetune.engines.mlx import sampling as mlx_sampling
from finetune.engines.torch import sampling as torch_sampling

LOGITS = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
Sampler: TypeAlias = Callable[..., tuple[int, float]]


def by_mlx(
    logits: Sequence[float], sampling: Sampling, *, number: int = 0, seen: Sequence[bool] | None = None
) -> tuple[int, float]:
    prompt = (0,) if seen is None else tuple(np.flatnonzero(seen).tolist())
    sampler = mlx_sampling.RowSampler(len(logits), [GenerationRequest(prompt, 1, sampling)])
    [choice] = sampler.choose(mx.array(np.array([logits])), [number], {}, [0]).result()
    return choice.token, choice.logprob


def by_pytorch(
    logits: Sequence[float], sampling: Sampling, *, number: int = 0, seen: Sequence[bool] | None = None
) -> tuple[int, float]:
    marks = torch.zeros(len(logits), dtype=torch.bool) if seen is None else torch.tensor(seen)
    row = torch_sampling.SampledRow(
        GenerationRequest((0,), 1, sampling), number, torch_sampling.Spoken(marks, torch.zeros(len(logits)))
    )
    [choice] = torch_sampling.choose(torch.tensor(np.array([logits])), [row])
    return choice.token, choice.logprob


@pytest.fixture(params=[by_mlx, by_pytorch])
def sample(request: pytest.FixtureRequest) -> Sampler:
    return request.param


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.6), {0, 1}),
        (Sampling(temperature=1.0, min_p=0.25), {0, 1, 2}),
        (Sampling(temperature=0.5, min_p=0.25), {0, 1}),
        (Sampling(temperature=0.5, top_k=3, top_p=0.935), {0, 1}),
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
    ],
    ids=["top_k", "top_p", "min_p", "temperature before min_p", "top_k before top_p", "none"],
)
def test_filters_keep_the_tokens_they_say(sample: Sampler, sampling: Sampling, allowed: set[int]) -> None:
    """top_p 0.6 needs two; min_p 0.25 of the best keeps 0.125 and more.

    Temperature 0.5 squares: 0.685, 0.247, 0.062, 0.007, so min_p 0.25 needs 0.171. Of the best three, the first two
    have 0.938 of the mass, more than top_p 0.935 needs; without top_k they would have 0.932.
    """
    drawn = {sample(LOGITS, replace(sampling, seed=seed))[0] for seed in range(300)}
    assert drawn == allowed


def test_a_repetition_penalty_lowers_seen_tokens(sample: Sampler) -> None:
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    token, logprob = sample(logits, Sampling(repetition_penalty=2.0), seen=[True, False, False])
    assert token == 1
    assert logprob == pytest.approx(1.5 - np.log(np.exp(logits).sum()), rel=1e-5)


def test_a_repetition_penalty_lowers_negative_logits_too(sample: Sampler) -> None:
    token, _ = sample(np.array([-1.0, -1.5], np.float32), Sampling(repetition_penalty=2.0), seen=[True, False])
    assert token == 1


def test_log_probabilities_are_those_of_the_unmodified_distribution(sample: Sampler) -> None:
    sampling = Sampling(temperature=0.3, top_k=3, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=3)
    token, logprob = sample(LOGITS, sampling, seen=[True, False, True, False])
    assert logprob == pytest.approx(float(LOGITS[token]), abs=1e-6)


def test_every_token_of_a_request_has_its_own_draw(sample: Sampler) -> None:
    drawn = [sample(LOGITS, Sampling(temperature=1.0), number=number)[0] for number in range(600)]
    shares = np.bincount(drawn, minlength=4) / 600
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.08)  # four standard deviations


def test_every_seed_draws_anew_and_the_same_seed_again_the_same(sample: Sampler) -> None:
    drawn = [sample(LOGITS, Sampling(temperature=1.0, seed=seed))[0] for seed in range(600)]
    shares = np.bincount(drawn, minlength=4) / 600
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.08)
    assert drawn[:50] == [sample(LOGITS, Sampling(temperature=1.0, seed=seed))[0] for seed in range(50)]


def test_a_large_vocabulary_is_filtered_as_a_sorted_one_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose best few tokens are enough, rows that need more of them, and rows without a limit, side by side."""
    rng = np.random.default_rng(0)
    samplings = [
        Sampling(temperature=1.0, top_p=top_p, top_k=top_k, seed=row)
        for row, (top_p, top_k) in enumerate([(0.5, 0), (0.99, 0), (1.0, 0), (0.9, 7), (1.0, 20), (0.9, 500), (1.0, 1)])
    ]
    logits = torch.tensor(rng.normal(0, [[3.0], [0.1], [1.0], [1.0], [2.0], [0.2], [1.0]], (7, 600)), dtype=torch.float)

    def drawn(candidates: int) -> list[int]:
        monkeypatch.setattr(torch_sampling, "CANDIDATES", candidates)
        tokens = []
        for number in range(60):
            rows = [torch_sampling.SampledRow(GenerationRequest((0,), 1, sampling), number) for sampling in samplings]
            tokens += [choice.token for choice in torch_sampling.choose(logits, rows)]
        return tokens

    assert drawn(32) == drawn(600)

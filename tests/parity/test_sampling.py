"""Which tokens each filter leaves, against probabilities worked out by hand."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from finetune.core.types import Sampling
from finetune.engines.mlx.sampling import sample


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.6), {0, 1}),
        (Sampling(temperature=1.0, min_p=0.25), {0, 1, 2}),
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
    ],
    ids=["top_k", "top_p", "min_p", "none"],
)
def test_filters_keep_the_tokens_they_say(sampling: Sampling, allowed: set[int]) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05: top_p 0.6 needs two, min_p 0.25 of the best keeps 0.125 and more."""
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    drawn = {int(sample(logits, replace(sampling, seed=seed), number=0, seen=None)[0].item()) for seed in range(300)}
    assert drawn == allowed


def test_a_repetition_penalty_lowers_seen_tokens() -> None:
    seen = mx.array([True, False, False])
    token, logprob = sample(mx.array([2.0, 1.5, -1.0]), Sampling(repetition_penalty=2.0), number=0, seen=seen)
    assert token.item() == 1
    assert logprob.item() == pytest.approx(1.5 - np.log(np.exp([2.0, 1.5, -1.0]).sum()), rel=1e-5)


def test_every_token_of_a_request_has_its_own_draw() -> None:
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    drawn = [int(sample(logits, Sampling(temperature=1.0), number=n, seen=None)[0].item()) for n in range(600)]
    shares = np.bincount(drawn, minlength=4) / 600
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.08)  # four standard deviations

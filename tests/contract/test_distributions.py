"""Distributions over the whole vocabulary: those of scoring, for the base and for an adapter."""

from pathlib import Path

import numpy as np
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference
from tests.support.tiny_adapters import adapt
from tests.support.tiny_models import VOCABULARY

from finetune.engines.base import Engine


def test_distributions_agree_with_the_log_probabilities_of_the_targets(
    engine: Engine, llama: Path, tmp_path: Path
) -> None:
    adapter = adapt(engine, llama, tmp_path / "adapter")
    session = open_inference(engine, llama, tuned=adapter)
    batch = batch_of(random_rows(3, vocabulary=VOCABULARY), prompt=2)
    for name in (None, "tuned"):
        found = session.logprobs(batch, adapter=name)
        assert found.shape == (batch.trained_tokens, VOCABULARY)
        # float32 sums over a few hundred tokens
        np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
        at_targets = np.take_along_axis(found, batch.targets[batch.loss_mask][:, None], axis=1)[:, 0]
        expected = session.token_logprobs(batch, adapter=name)[batch.loss_mask]
        np.testing.assert_allclose(at_targets, expected, atol=1e-5)
    assert np.abs(session.logprobs(batch) - found).max() > 0.05

"""Documents packed into rows give what each of them gives in a row of its own, for every architecture."""

from pathlib import Path

import numpy as np
import pytest
from tests.support.batches import batch_of, packed_batch, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.tiny_models import CONFIGS, VOCABULARY, make_model

from finetune.config.schema import LoraConfig
from finetune.core.types import Batch, FloatArray
from finetune.engines.base import Engine

ROWS = random_rows(6, vocabulary=VOCABULARY, lengths=(3, 24))  # some longer than gemma3's window of 8
PADDED = batch_of(ROWS, prompt=2)
PACKED = {
    "one row": packed_batch([ROWS], prompt=2),
    "trailing padding": packed_batch([ROWS], prompt=2, width=160),
    "two rows": packed_batch([ROWS[:4], ROWS[4:]], prompt=2),
    "another order": packed_batch([ROWS[::-1]], prompt=2),
}
SUMS_OF_FLOAT32 = 2e-5  # relative; the order of additions and the rounding of rotary angles
NATS = 2e-5  # the same for one log-probability of a few nats


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


def update_of(engine: Engine, model: Path, batch: Batch) -> tuple[float, dict[str, FloatArray]]:
    """(loss, minus the gradient): SGD with rate 1 from weights that one step has made all different from zero."""
    session = open_training(
        engine, model, lora=LoraConfig(rank=4), optimizer="sgd", beta1=0.0, max_grad_norm=None, weight_decay=0.0
    )
    session.step([PADDED], learning_rate=0.01).result()
    before = session.weights()
    loss = session.step([batch], learning_rate=1.0).result().loss
    return loss, {name: value - before[name] for name, value in session.weights().items()}


def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(engine: Engine, model: Path) -> None:
    loss, expected = update_of(engine, model, PADDED)
    for batch in (PACKED["one row"], PACKED["two rows"]):
        packed_loss, found = update_of(engine, model, batch)
        assert packed_loss == pytest.approx(loss, rel=SUMS_OF_FLOAT32)
        for name, gradient in expected.items():
            atol = SUMS_OF_FLOAT32 * float(np.abs(gradient).max()) + 1e-6  # of the weight that carries the gradient
            np.testing.assert_allclose(found[name], gradient, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("packing", PACKED)
def test_packed_rows_are_scored_like_padded_ones(engine: Engine, model: Path, packing: str) -> None:
    session = open_inference(engine, model)
    expected, found = session.loss(PADDED), session.loss(PACKED[packing])
    assert found.total == pytest.approx(expected.total, rel=SUMS_OF_FLOAT32)
    assert (found.tokens, found.correct) == (expected.tokens, expected.correct)


def test_each_document_has_the_log_probabilities_that_it_has_alone(engine: Engine, model: Path) -> None:
    session = open_inference(engine, model)
    packed = session.token_logprobs(packed_batch([ROWS]))[0]
    alone = [session.token_logprobs(batch_of([row]))[0] for row in ROWS]
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=0, atol=NATS)


@pytest.mark.parametrize("changed", [0, 3, 5], ids=["first", "middle", "last"])
def test_a_document_does_not_see_its_neighbours(engine: Engine, model: Path, changed: int) -> None:
    session = open_inference(engine, model)
    others = [*ROWS]
    others[changed] = ((ROWS[changed] + 7) % VOCABULARY).astype(np.int32)
    before, after = (session.token_logprobs(packed_batch([rows]))[0] for rows in (ROWS, others))
    start = sum(len(row) - 1 for row in ROWS[:changed])
    inside = np.zeros(len(before), np.bool_)
    inside[start : start + len(ROWS[changed]) - 1] = True
    np.testing.assert_allclose(after[~inside], before[~inside], rtol=0, atol=1e-6)  # products of another alignment
    assert np.abs(after[inside] - before[inside]).max() > 0.1


def test_a_batch_without_a_trained_document_has_no_loss(engine: Engine, model: Path) -> None:
    loss = open_inference(engine, model).loss(packed_batch([ROWS], prompt=100))
    assert (loss.total, loss.tokens, loss.correct) == (0.0, 0, 0)

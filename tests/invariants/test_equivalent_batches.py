"""One data set cut in different ways is one data set: losses and updates agree to float32's rounding."""

from pathlib import Path

import numpy as np
import pytest
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.tiny_models import VOCABULARY

from finetune.config.schema import LoraConfig
from finetune.core.types import Batch
from finetune.engines.base import Engine

ROWS = random_rows(8, vocabulary=VOCABULARY, lengths=(4, 24))
CUTS: dict[str, list[Batch]] = {
    "8x1": [batch_of(ROWS, prompt=3)],
    "4x2": [batch_of(ROWS[:4], prompt=3), batch_of(ROWS[4:], prompt=3)],
    "1x8": [batch_of([row], prompt=3) for row in ROWS],
    "padded": [batch_of(ROWS, prompt=3, width=40)],
    "padded with a token that occurs": [batch_of(ROWS, prompt=3, width=40, pad=5)],
}
SUMS_OF_FLOAT32 = 1e-5  # relative; the order of additions is all that differs


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_do_not_depend_on_the_cut(engine: Engine, llama: Path, method: str, cut: str) -> None:
    """SGD with rate 1 moves weights by the gradient, which is compared relative to its largest entry."""
    moves, losses = [], []
    for micro_batches in (CUTS["8x1"], CUTS[cut]):
        session = open_training(
            engine, llama, lora=LoraConfig(rank=4), method=method, optimizer="sgd", beta1=0.0, max_grad_norm=None
        )
        session.step(CUTS["8x1"], learning_rate=0.01).result()  # so that B is not zero
        before = session.weights()
        result = session.step(micro_batches, learning_rate=1.0).result()
        losses.append((result.loss, result.grad_norm))
        moves.append({name: value - before[name] for name, value in session.weights().items()})
    assert losses[1] == pytest.approx(losses[0], rel=SUMS_OF_FLOAT32)
    for name, expected in moves[0].items():
        largest = float(np.abs(expected).max())
        rounding = 2e-7 * float(np.abs(before[name]).max())  # of the weight that carries the gradient
        np.testing.assert_allclose(moves[1][name], expected, rtol=0, atol=SUMS_OF_FLOAT32 * largest + 2 * rounding)


@pytest.mark.parametrize("cut", CUTS)
def test_evaluation_does_not_depend_on_the_batch_size(engine: Engine, llama: Path, cut: str) -> None:
    session = open_inference(engine, llama)
    whole = session.loss(CUTS["8x1"][0])
    total = sum((session.loss(batch) for batch in CUTS[cut][1:]), start=session.loss(CUTS[cut][0]))
    assert total.total == pytest.approx(whole.total, rel=SUMS_OF_FLOAT32)
    assert (total.tokens, total.correct) == (whole.tokens, whole.correct)


def test_a_batch_of_padding_and_prompts_has_no_loss(engine: Engine, llama: Path) -> None:
    loss = open_inference(engine, llama).loss(batch_of(ROWS[:2], prompt=100))
    assert (loss.total, loss.tokens, loss.correct) == (0.0, 0, 0)


def test_an_untrained_token_has_no_influence_as_a_target(engine: Engine, llama: Path) -> None:
    batch = batch_of(ROWS, prompt=3)
    targets = np.where(batch.loss_mask, batch.targets, 7).astype(np.int32)
    changed = Batch(batch.inputs, targets, batch.loss_mask, batch.positions, batch.segments)
    session = open_inference(engine, llama)
    assert session.loss(changed) == session.loss(batch)

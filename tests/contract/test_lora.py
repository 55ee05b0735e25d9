"""What LoRA is, on every engine: shapes, the starting point, gradients, and a loss that falls."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.tiny_models import VOCABULARY

from finetune.adapters.adapter import peft_names
from finetune.adapters.lora import lora_scale, seeded_init
from finetune.config.schema import LoraConfig
from finetune.core.errors import ConfigError
from finetune.core.types import FloatArray
from finetune.engines.base import Engine, TrainSession

pytestmark = pytest.mark.lora
ROWS = random_rows(4, vocabulary=VOCABULARY)
BATCH = batch_of(ROWS, prompt=2)
UP = "model.layers.1.mlp.up_proj"


@pytest.mark.lora_quick
def test_adapters_have_pefts_names_and_shapes(engine: Engine, llama: Path) -> None:
    weights = open_training(engine, llama, lora=LoraConfig(rank=4)).weights()
    a, b, _ = peft_names(UP)
    assert weights[a].shape == (4, 32)
    assert weights[b].shape == (48, 4)
    assert len(weights) == 2 * 7 * 2  # A and B of seven linear modules in two layers; the head is left out


@pytest.mark.lora_quick
def test_a_new_adapter_changes_nothing(engine: Engine, llama: Path) -> None:
    session = open_training(engine, llama, lora=LoraConfig(rank=4, dropout=0.5))
    assert session.loss(BATCH) == open_inference(engine, llama).loss(BATCH)


def test_a_starts_from_the_shared_draw_and_b_from_zero(engine: Engine, llama: Path) -> None:
    weights = open_training(engine, llama, lora=LoraConfig(rank=4)).weights()
    a, b, _ = peft_names(UP)
    np.testing.assert_array_equal(weights[a], seeded_init(0)(UP, 4, 32))
    assert not weights[b].any()


@pytest.mark.lora_quick
def test_the_loss_falls(engine: Engine, llama: Path) -> None:
    session = open_training(engine, llama)
    before = session.loss(BATCH).mean
    losses = [session.step([BATCH], learning_rate=1e-2).result().loss for _ in range(20)]
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert session.loss(BATCH).mean < 0.7 * before


def test_only_adapters_change(engine: Engine, llama: Path, tmp_path: Path) -> None:
    session = open_training(engine, llama)
    session.step([BATCH], learning_rate=1e-2).result()
    session.save_weights(tmp_path)
    inference = open_inference(engine, llama, tuned=tmp_path)
    assert inference.loss(BATCH) == open_inference(engine, llama).loss(BATCH)
    assert inference.loss(BATCH, adapter="tuned").total == pytest.approx(session.loss(BATCH).total, rel=1e-6)


def test_parameters_are_counted(engine: Engine, llama: Path) -> None:
    count = open_training(engine, llama, lora=LoraConfig(rank=4, target_modules=("q_proj",))).parameters
    assert count.trainable == 2 * 4 * (32 + 32)
    base = 2 * 272 * 32 + 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)
    assert count.total == base + count.trainable
    assert open_inference(engine, llama).parameters.total == base


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ((UP,), {UP}),
        (("lm_head",), {"lm_head"}),
    ],
    ids=["suffix", "full name", "head"],
)
def test_targets_are_suffixes_or_full_names(
    engine: Engine, llama: Path, targets: tuple[str, ...], expected: set[str]
) -> None:
    session = open_training(engine, llama, lora=LoraConfig(rank=4, target_modules=targets))
    assert set(session.weights()) == {name for module in expected for name in peft_names(module)[:2]}
    before = session.loss(BATCH).mean
    session.step([BATCH], learning_rate=1e-2).result()
    assert session.loss(BATCH).mean < before


def test_wrong_targets_are_reported_together_with_what_exists(engine: Engine, llama: Path) -> None:
    lora = LoraConfig(rank=200, target_modules=("q_porj", "v_proj"), rank_pattern={"down_proj": 2})
    with pytest.raises(ConfigError) as caught:
        open_training(engine, llama, lora=lora)
    message = str(caught.value)
    assert "3 problems" in message
    assert "Did you mean q_proj?" in message
    assert "down_proj" in message
    assert "lora.rank=200 is more than the width 16 of v_proj" in message


def test_rank_pattern_gives_modules_their_own_rank(engine: Engine, llama: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=4, target_modules=("q_proj", "up_proj"), rank_pattern={"layers.1.mlp.up_proj": 2})
    session = open_training(engine, llama, lora=lora)
    assert session.weights()[peft_names(UP)[0]].shape == (2, 32)
    session.step([BATCH], learning_rate=1e-2).result()
    session.save_weights(tmp_path)
    reloaded = open_inference(engine, llama, tuned=tmp_path).loss(BATCH, adapter="tuned")
    assert reloaded.total == pytest.approx(session.loss(BATCH).total, rel=1e-6)


@pytest.mark.lora_quick
@pytest.mark.parametrize("which", [0, 1], ids=["A", "B"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_gradients_agree_with_finite_differences(
    engine: Engine, llama: Path, tmp_path: Path, which: int, use_rslora: bool
) -> None:
    """SGD without momentum moves a weight by -lr x gradient / tokens, which shows the gradient through the contract.

    Central differences in float32: with eps 1e-2 the truncation error (eps^2) and the rounding of a loss of about 8
    (1e-6 / eps) are both near 1e-4, so 2 % of the largest entry is a safe bound that any wrong factor exceeds.
    """
    lora = LoraConfig(rank=4, alpha=8, target_modules=(UP,), use_rslora=use_rslora)
    session = open_training(engine, llama, lora=lora, optimizer="sgd", beta1=0.0, max_grad_norm=None)
    for _ in range(3):  # so that B is not zero
        session.step([BATCH], learning_rate=0.5).result()
    before = session.weights()
    session.step([BATCH], learning_rate=1e-3).result()
    name = peft_names(UP)[which]
    gradient = (before[name] - session.weights()[name]) / 1e-3
    entries = [np.unravel_index(index, gradient.shape) for index in np.argsort(-np.abs(gradient).ravel())[:3]]
    for entry in entries:
        measured = _central_difference(engine, llama, tmp_path, lora, before, name, entry)
        assert float(gradient[entry]) == pytest.approx(measured, abs=0.02 * float(np.abs(gradient).max()))


def _central_difference(
    engine: Engine,
    model: Path,
    folder: Path,
    lora: LoraConfig,
    weights: Mapping[str, FloatArray],
    name: str,
    entry: tuple[int, ...],
) -> float:
    losses = []
    for shift in (1e-2, -1e-2):
        shifted = {key: value.copy() for key, value in weights.items()}
        shifted[name][entry] += shift
        losses.append(_loss_of_folded(engine, model, folder / "folded", lora, shifted))
    return (losses[0] - losses[1]) / 2e-2


def _loss_of_folded(
    engine: Engine, model: Path, folder: Path, lora: LoraConfig, weights: Mapping[str, FloatArray]
) -> float:
    """The loss of a base into which NumPy has folded the update: no LoRA code takes part."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    a, b = (weights[key] for key in peft_names(UP)[:2])
    tensors[f"{UP}.weight"] += lora_scale(lora.effective_alpha, lora.rank, use_rslora=lora.use_rslora) * (b @ a)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_inference(engine, folder).loss(BATCH).mean


def test_dropout_acts_in_steps_only_and_follows_the_seed(engine: Engine, llama: Path) -> None:
    def trained(seed: int, dropout: float) -> dict[str, np.ndarray]:
        session = open_training(engine, llama, lora=LoraConfig(rank=4, dropout=dropout), seed=seed)
        for _ in range(2):
            session.step([BATCH], learning_rate=1e-2).result()
        assert session.loss(BATCH) == session.loss(BATCH)
        return dict(session.weights())

    name = peft_names(UP)[1]
    once, again, other, without = trained(1, 0.3), trained(1, 0.3), trained(2, 0.3), trained(1, 0.0)
    np.testing.assert_array_equal(once[name], again[name])
    assert np.abs(once[name] - other[name]).max() > 1e-4
    assert np.abs(once[name] - without[name]).max() > 1e-4


def test_every_step_and_micro_batch_has_its_own_dropout(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 only the draw can change the loss."""

    def resumed() -> TrainSession:
        session = open_training(engine, llama, lora=LoraConfig(rank=4, dropout=0.5))
        session.load_state(tmp_path)
        return session

    start = open_training(engine, llama, lora=LoraConfig(rank=4, dropout=0.5))
    start.step([BATCH], learning_rate=0.1).result()
    start.save_weights(tmp_path)
    start.save_state(tmp_path)
    session = resumed()
    once, again = (session.step([BATCH], learning_rate=0.0).result().loss for _ in range(2))
    assert abs(once - again) > 1e-4
    assert abs(resumed().step([BATCH, BATCH], learning_rate=0.0).result().loss - once) > 1e-4
    assert resumed().step([BATCH], learning_rate=0.0).result().loss == once

"""What a training session promises beyond LoRA: the guard, clipping, full tuning, resuming, checkpointed layers."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.tiny_models import VOCABULARY

from finetune.config.schema import LoraConfig, ModelConfig
from finetune.core.errors import CheckpointError, TrainingError
from finetune.core.paths import ADAPTER_WEIGHTS
from finetune.engines.base import Engine, TrainSession

ROWS = random_rows(6, vocabulary=VOCABULARY)
BATCH = batch_of(ROWS[:4])
STEPS = [[batch_of(ROWS[:3]), batch_of(ROWS[3:])], [batch_of(ROWS[2:5])], [BATCH], [batch_of(ROWS)]]
METHODS = pytest.mark.parametrize("method", ["lora", "full"])


def poison(session: TrainSession) -> None:
    """One step so large that the next loss is not finite."""
    session.step([BATCH], learning_rate=1e20).result()


def same(left: TrainSession, right: TrainSession) -> bool:
    ours, theirs = left.weights(), right.weights()
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@METHODS
def test_a_step_that_is_not_finite_changes_nothing(engine: Engine, llama: Path, tmp_path: Path, method: str) -> None:
    session = open_training(engine, llama, method=method, max_grad_norm=None)
    poison(session)
    before = {name: value.copy() for name, value in session.weights().items()}
    (tmp_path / "before").mkdir()
    session.save_state(tmp_path / "before")
    result = session.step([BATCH], learning_rate=1e-3).result()
    assert not result.applied
    session.save_state(tmp_path)
    for name, value in session.weights().items():
        np.testing.assert_array_equal(value, before[name])
    state, expected = (
        load_file(tmp_path / "optimizer.safetensors"),
        load_file(tmp_path / "before/optimizer.safetensors"),
    )
    assert state.pop("calls") == expected.pop("calls") + 1  # the dropout stream moves on
    for name, value in state.items():
        np.testing.assert_array_equal(value, expected[name])


def test_the_gradient_is_clipped_to_the_norm(engine: Engine, llama: Path) -> None:
    options = {"optimizer": "sgd", "beta1": 0.0}
    free = open_training(engine, llama, max_grad_norm=None, **options)
    clipped = open_training(engine, llama, max_grad_norm=0.01, **options)
    start = free.weights()
    norm = free.step([BATCH], learning_rate=1.0).result().grad_norm
    assert clipped.step([BATCH], learning_rate=1.0).result().grad_norm == pytest.approx(norm)
    moved = np.sqrt(sum(np.square(start[name] - value).sum() for name, value in free.weights().items()))
    assert moved == pytest.approx(norm, rel=1e-3)
    moved = np.sqrt(sum(np.square(start[name] - value).sum() for name, value in clipped.weights().items()))
    assert moved == pytest.approx(0.01, rel=1e-3)


@METHODS
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_a_resumed_session_is_the_uninterrupted_one(
    engine: Engine, llama: Path, tmp_path: Path, method: str, optimizer: str
) -> None:
    def fresh() -> TrainSession:
        lora = LoraConfig(rank=4, dropout=0.2)
        return open_training(engine, llama, lora=lora, method=method, optimizer=optimizer, weight_decay=0.01)

    whole, first = fresh(), fresh()
    for micro_batches in STEPS:
        whole.step(micro_batches, learning_rate=1e-2)
    for micro_batches in STEPS[:2]:
        first.step(micro_batches, learning_rate=1e-2)
    first.save_weights(tmp_path)
    first.save_state(tmp_path)
    first.close()
    second = fresh()
    second.load_state(tmp_path)
    for micro_batches in STEPS[2:]:
        second.step(micro_batches, learning_rate=1e-2)
    assert same(whole, second)
    for name, session in (("whole", whole), ("second", second)):
        session.save_weights(tmp_path / name)
    file = ADAPTER_WEIGHTS if method == "lora" else "model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_full_tuning_in_bfloat16_resumes_exactly_too(engine: Engine, llama: Path, tmp_path: Path) -> None:
    config = ModelConfig(name="base", dtype="bfloat16")
    session = open_training(engine, llama, method="full", model_config=config)
    session.step([BATCH], learning_rate=1e-5).result()
    session.save_weights(tmp_path)
    session.save_state(tmp_path)
    resumed = open_training(engine, llama, method="full", model_config=config)
    resumed.load_state(tmp_path)
    assert same(session, resumed)  # float32 weights, although the model's file is rounded to bfloat16


def test_a_state_of_another_configuration_is_refused(engine: Engine, llama: Path, tmp_path: Path) -> None:
    session = open_training(engine, llama)
    session.save_weights(tmp_path)
    session.save_state(tmp_path)
    with pytest.raises(CheckpointError, match="another optimizer"):
        open_training(engine, llama, optimizer="sgd").load_state(tmp_path)
    with pytest.raises(CheckpointError, match="another optimizer"):
        open_training(engine, llama, lora=LoraConfig(rank=2)).load_state(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        session.load_state(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "tied_llama"])
def test_full_tuning_changes_every_weight_and_keeps_ties(
    engine: Engine, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    model = request.getfixturevalue(kind)
    session = open_training(engine, model, method="full")
    before = session.loss(BATCH).mean
    for _ in range(5):
        session.step([BATCH], learning_rate=1e-2).result()
    session.save_weights(tmp_path)
    base, tuned = load_file(model / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert base.keys() == tuned.keys()
    assert ("lm_head.weight" in tuned) == (kind == "llama")
    unchanged = [name for name in base if np.array_equal(base[name], tuned[name])]
    assert unchanged == []
    assert session.loss(BATCH).mean < before
    assert open_inference(engine, tmp_path).loss(BATCH).total == pytest.approx(session.loss(BATCH).total, rel=1e-6)


def test_weight_decay_leaves_norms_alone(engine: Engine, llama: Path) -> None:
    """With a learning rate of 0 for the gradient's part: decay is the only thing that SGD's norm sees."""
    plain = open_training(engine, llama, method="full", weight_decay=0.0)
    decayed = open_training(engine, llama, method="full", weight_decay=0.5)
    for session in (plain, decayed):
        session.step([BATCH], learning_rate=1e-2).result()
    left, right = plain.weights(), decayed.weights()
    differing = {name for name in left if not np.array_equal(left[name], right[name])}
    assert differing == {name for name in left if "norm" not in name}


@METHODS
def test_recomputed_activations_give_the_same_step(engine: Engine, llama: Path, method: str) -> None:
    lora = LoraConfig(rank=4, dropout=0.2)
    kept = open_training(engine, llama, lora=lora, method=method)
    recomputed = open_training(engine, llama, lora=lora, method=method, gradient_checkpointing=True)
    for micro_batches in STEPS:
        expected = kept.step(micro_batches, learning_rate=1e-2).result()
        assert recomputed.step(micro_batches, learning_rate=1e-2).result() == expected
    assert same(kept, recomputed)


def test_random_weights_follow_the_seed(engine: Engine, llama: Path) -> None:
    config = ModelConfig(name="base", init="random", dtype="float32")

    def opened(seed: int) -> TrainSession:
        return open_training(engine, llama, method="full", model_config=config, seed=seed)

    assert same(opened(1), opened(1))
    assert not same(opened(1), opened(2))
    weights = opened(1).weights()
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(0.2, rel=0.05)  # initializer_range
    np.testing.assert_array_equal(weights["model.norm.weight"], np.ones(32))
    session = opened(1)
    assert session.loss(BATCH).mean > 5.0  # near ln 272: nothing of the stored weights is left
    losses = [session.step([BATCH], learning_rate=1e-2).result().loss for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_without_trained_tokens_is_refused(engine: Engine, llama: Path) -> None:
    with pytest.raises(TrainingError, match="no token to train on"):
        open_training(engine, llama).step([batch_of(ROWS[:1], prompt=100)], learning_rate=1e-3)


def test_memory_is_measured(engine: Engine, llama: Path) -> None:
    session = open_training(engine, llama)
    session.step([BATCH], learning_rate=1e-3).result()
    assert 100_000 < session.peak_memory_bytes() < 2 * 10**9

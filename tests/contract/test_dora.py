"""DoRA on every engine: PEFT's curve, the start, the gradient of the magnitudes, and what dropout leaves alone."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support import peft_loop
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training, require_exact_resume
from tests.support.tiny_adapters import adapt
from tests.support.tiny_models import VOCABULARY, make_model
from tests.support.trajectories import drift, short_steps, walk, warm_rates

from finetune.adapters.adapter import LoraUpdate, peft_names
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import read_adapter
from finetune.config.schema import LoraConfig, TrainingConfig
from finetune.core.types import FloatArray
from finetune.engines.base import Engine, TrainSession

# PEFT 0.21 still asks transformers 5 for a property under its old name.
pytestmark = [pytest.mark.lora, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

STEPS = 50
# Float32 adds in another order in each library: 50 steps come to 1e-5. A gradient that goes through n, or a
# magnitude that decays otherwise, shows at 1e-2.
DRIFT = 1e-3
BATCH = batch_of(random_rows(4, vocabulary=VOCABULARY), prompt=2)
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[float]]]:
    """A model and the losses of PEFT's DoRA on it, once for both engines."""

    @cache
    def run(kind: str) -> tuple[Path, list[float]]:
        path = make_model(tmp_path_factory.mktemp("models") / kind, kind)
        model = peft_loop.with_peft(peft_loop.load(path), LoraConfig(rank=4), use_dora=True)
        rates = warm_rates(STEPS, 1e-2)
        return path, peft_loop.train(model, short_steps(STEPS), TrainingConfig(weight_decay=0.1), rates=rates)

    return run


# No biases, biases of some modules, weights stored as (in, out).
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_dora_walks_the_curve_of_peft(
    engine: Engine, reference_run: Callable[[str], tuple[Path, list[float]]], kind: str
) -> None:
    path, expected = reference_run(kind)
    session = open_training(engine, path, method="dora", weight_decay=0.1)
    found = walk(session, short_steps(STEPS), rates=warm_rates(STEPS, 1e-2))
    assert drift(found, expected).max() < DRIFT
    assert expected[-1] < 0.9 * expected[0]  # a curve that goes nowhere would agree with anything


@pytest.mark.lora_quick
def test_a_new_dora_adapter_changes_nothing(engine: Engine, llama: Path) -> None:
    session = open_training(engine, llama, method="dora")
    expected = open_inference(engine, llama).loss(BATCH)
    assert session.loss(BATCH).total == pytest.approx(expected.total, rel=1e-6)  # m / n is 1, sums differ


def test_magnitudes_start_as_the_norms_of_the_rows(engine: Engine, llama: Path) -> None:
    weights = open_training(engine, llama, method="dora").weights()
    stored = load_file(llama / "model.safetensors")[f"{UP}.weight"]
    # a sum of 32 squares in float32
    np.testing.assert_allclose(weights[peft_names(UP).magnitude], np.linalg.norm(stored, axis=1), rtol=1e-6)


@pytest.mark.parametrize("zero", [False, True], ids=["as trained", "some magnitudes zero"])
def test_the_gradient_of_the_magnitudes_agrees_with_finite_differences(
    engine: Engine, llama: Path, tmp_path: Path, zero: bool
) -> None:
    """SGD without momentum moves a weight by -lr x gradient, which shows the gradient through the contract.

    y is linear in m, so that a wide step measures the derivative well: 2 % of the largest entry bounds what the
    curvature of the loss adds.
    """
    start = _sharpened(engine, llama, tmp_path / "start", zero=zero)
    lora = LoraConfig(rank=4, target_modules=(UP,), init_from=str(start))
    session = open_training(engine, llama, lora=lora, method="dora", optimizer="sgd", beta1=0.0, max_grad_norm=None)
    before = session.weights()
    session.step([BATCH], learning_rate=1e-3).result()
    name = peft_names(UP).magnitude
    gradient = (before[name] - session.weights()[name]) / 1e-3
    chosen = [0, 1, 2] if zero else np.argsort(-np.abs(gradient))[:3]
    for row in chosen:
        measured = _central_difference(engine, llama, tmp_path / "folded", before, name, int(row))
        assert float(gradient[row]) == pytest.approx(measured, abs=0.02 * float(np.abs(gradient).max()))


def _sharpened(engine: Engine, model: Path, destination: Path, *, zero: bool) -> Path:
    """A random DoRA adapter of one module; with `zero` its first three magnitudes vanish."""
    adapt(engine, model, destination, method="dora", target_modules=(UP,))
    if zero:
        plain = read_adapter(destination)
        update = plain.updates[UP]
        assert update.magnitude is not None
        magnitude = update.magnitude.copy()
        magnitude[:3] = 0.0
        write_adapter(destination, replace(plain, updates={UP: update._replace(magnitude=magnitude)}))
    return destination


def _central_difference(
    engine: Engine, model: Path, folder: Path, weights: Mapping[str, FloatArray], name: str, row: int
) -> float:
    losses = []
    for shift in (2e-2, -2e-2):
        shifted = {key: value.copy() for key, value in weights.items()}
        shifted[name][row] += shift
        losses.append(_loss_of_folded(engine, model, folder, shifted))
    return (losses[0] - losses[1]) / 4e-2


def _loss_of_folded(engine: Engine, model: Path, folder: Path, weights: Mapping[str, FloatArray]) -> float:
    """The loss of a base into which NumPy has folded the update: no engine's adapter code takes part."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    tensors[f"{UP}.weight"] = _folded(tensors[f"{UP}.weight"], LoraUpdate(*(weights[key] for key in peft_names(UP))))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_inference(engine, folder).loss(BATCH).mean


def _folded(weight: np.ndarray, update: LoraUpdate) -> np.ndarray:
    """m (W + s B A) / |W + s B A| with s = 2, the default."""
    assert update.magnitude is not None
    direction = weight + 2.0 * update.b @ update.a
    folded: np.ndarray = update.magnitude[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    return folded


@pytest.mark.lora_quick
def test_adapters_of_both_kinds_answer_side_by_side(engine: Engine, llama: Path, tmp_path: Path) -> None:
    dora = _sharpened(engine, llama, tmp_path / "dora", zero=False)
    lora = adapt(engine, llama, tmp_path / "lora", target_modules=(UP,))
    update = read_adapter(dora).updates[UP]
    folded = _loss_of_folded(engine, llama, tmp_path / "folded", dict(zip(peft_names(UP), update, strict=True)))  # type: ignore[arg-type]
    session = open_inference(engine, llama, dora=dora, lora=lora)
    plain = session.loss(BATCH).mean
    first = [session.loss(BATCH, adapter=name).mean for name in ("dora", "lora")]
    again = [session.loss(BATCH, adapter=name).mean for name in ("dora", "lora")]
    assert first == again
    assert first[0] == pytest.approx(folded, rel=1e-5)  # float32, one module folded by NumPy
    assert len({plain, *first}) == 3


def test_dropout_reaches_the_low_rank_branch_alone(engine: Engine, llama: Path) -> None:
    """With B zero nothing is left to drop; PEFT would drop from W x as well."""
    session = open_training(engine, llama, lora=LoraConfig(rank=4, dropout=0.5), method="dora")
    before = session.loss(BATCH).mean
    assert session.step([BATCH], learning_rate=1e-2).result().loss == pytest.approx(before, rel=1e-6)
    now = session.loss(BATCH).mean
    assert abs(session.step([BATCH], learning_rate=0.0).result().loss - now) > 1e-4


def test_a_row_of_zeros_can_learn(engine: Engine, llama: Path, tmp_path: Path) -> None:
    pruned = shutil.copytree(llama, tmp_path / "pruned")
    tensors = load_file(llama / "model.safetensors")
    tensors[f"{UP}.weight"][:2] = 0.0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    session = open_training(engine, pruned, lora=LoraConfig(rank=4, target_modules=(UP,)), method="dora")
    for _ in range(5):
        assert session.step([BATCH], learning_rate=1e-2).result().applied
    names, weights = peft_names(UP), session.weights()
    assert np.isfinite(weights[names.b]).all()
    assert np.abs(weights[names.magnitude][:2]).min() > 0


def test_a_resumed_run_is_the_uninterrupted_one(engine: Engine, llama: Path, tmp_path: Path) -> None:
    def opened() -> TrainSession:
        return open_training(engine, llama, lora=LoraConfig(rank=4, dropout=0.2), method="dora")

    require_exact_resume(opened, BATCH, tmp_path)


def test_recomputed_activations_change_nothing(engine: Engine, llama: Path) -> None:
    curves = [
        walk(
            open_training(engine, llama, method="dora", gradient_checkpointing=recompute),
            short_steps(5),
            rates=warm_rates(5, 1e-2),
        )
        for recompute in (False, True)
    ]
    assert drift(*curves).max() < 1e-5  # the same products; the order of some sums differs

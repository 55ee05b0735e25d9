"""Fifty steps of training walk the curve of PEFT, transformers and torch's AdamW, on every architecture.

Both engines are held to the same reference, so they are at most twice the bound apart.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.support import peft_loop
from tests.support.engines import open_training
from tests.support.tiny_models import CONFIGS, make_model
from tests.support.trajectories import drift, short_steps, walk, warm_rates

from finetune.config.schema import LoraConfig, TrainingConfig
from finetune.engines.base import Engine

# PEFT 0.21 still asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# float32 adds in another order in each library, and AdamW enlarges that where gradients are small: 50 steps come to
# 3e-6 with seven layers. A mistake in scale, decay, clipping or weighting shows at 1e-2 within five steps.
DRIFT = 3e-5
LORA_STEPS, FULL_STEPS = 50, 20
Reference = Callable[[str], tuple[Path, list[float]]]  # an architecture's model, and the losses of the reference on it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def lora_run(models: Path) -> Reference:
    """Once for both engines."""

    @cache
    def run(kind: str) -> tuple[Path, list[float]]:
        path = make_model(models / kind, kind)
        model = peft_loop.with_peft(peft_loop.load(path), LoraConfig(rank=4))
        rates = warm_rates(LORA_STEPS, 1e-2)
        return path, peft_loop.train(model, short_steps(LORA_STEPS), TrainingConfig(weight_decay=0.1), rates=rates)

    return run


@pytest.mark.lora
@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_walks_the_curve_of_peft(engine: Engine, lora_run: Reference, kind: str) -> None:
    path, expected = lora_run(kind)
    session = open_training(engine, path, lora=LoraConfig(rank=4), weight_decay=0.1)
    found = walk(session, short_steps(LORA_STEPS), rates=warm_rates(LORA_STEPS, 1e-2))
    assert drift(found, expected).max() < DRIFT
    assert expected[-1] < 0.9 * expected[0]  # a curve that goes nowhere would agree with anything


@pytest.mark.lora
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4, alpha=6, use_rslora=True),
        LoraConfig(rank=4, alpha=6, rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 8}),
        LoraConfig(rank=4, target_modules=("q_proj", "layers.1.mlp.down_proj")),
    ],
    ids=["rslora", "ranks of single modules", "chosen modules"],
)
def test_other_settings_of_lora_walk_the_curve_of_peft(engine: Engine, llama: Path, lora: LoraConfig) -> None:
    steps, rates = short_steps(20), warm_rates(20, 1e-2)
    expected = peft_loop.train(peft_loop.with_peft(peft_loop.load(llama), lora), steps, TrainingConfig(), rates=rates)
    assert drift(walk(open_training(engine, llama, lora=lora), steps, rates=rates), expected).max() < DRIFT


@pytest.fixture(scope="module")
def full_run(models: Path) -> Reference:
    @cache
    def run(kind: str) -> tuple[Path, list[float]]:
        path = make_model(models / f"full-{kind}", kind)
        rates = warm_rates(FULL_STEPS, 1e-3)
        return path, peft_loop.train(peft_loop.load(path), short_steps(FULL_STEPS), TrainingConfig(), rates=rates)

    return run


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_full_tuning_walks_the_curve_of_a_plain_loop(engine: Engine, full_run: Reference, kind: str) -> None:
    path, expected = full_run(kind)
    session = open_training(engine, path, method="full")
    found = walk(session, short_steps(FULL_STEPS), rates=warm_rates(FULL_STEPS, 1e-3))
    assert drift(found, expected).max() < DRIFT
    assert expected[-1] < 0.9 * expected[0]

"""Opening sessions in engine tests without repeating what a test does not care about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Batch
from finetune.engines.base import Engine, InferenceSession, TrainSession

BASE = ModelConfig(name="base", dtype="float32")


def open_training(
    engine: Engine, model: Path, *, lora: LoraConfig | None = None, model_config: ModelConfig = BASE, **training: Any
) -> TrainSession:
    """A session with the given fields of the training configuration."""
    return engine.open_training(
        model,
        model_config=model_config,
        training=TrainingConfig(**training),
        lora=lora or LoraConfig(rank=4),
        init=seeded_init(0),
    )


def open_inference(engine: Engine, model: Path, **adapters: Path) -> InferenceSession:
    """A session over the base and adapters by name."""
    return engine.open_inference(model, model_config=BASE, adapters=adapters)


def require_exact_resume(opened: Callable[[], TrainSession], batch: Batch, directory: Path) -> None:
    """Four steps, and two and two with a save and a load between, give the same losses and weights, bit for bit."""
    whole, interrupted, resumed = opened(), opened(), opened()

    def losses(session: TrainSession, steps: int) -> list[float]:
        return [session.step([batch], learning_rate=1e-2).result().loss for _ in range(steps)]

    expected, found = losses(whole, 4), losses(interrupted, 2)
    interrupted.save_weights(directory)
    interrupted.save_state(directory)
    resumed.load_state(directory)
    assert found + losses(resumed, 2) == expected
    for name, array in whole.weights().items():
        np.testing.assert_array_equal(resumed.weights()[name], array)

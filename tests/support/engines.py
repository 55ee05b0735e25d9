"""Opening sessions in engine tests without repeating what a test does not care about."""

from pathlib import Path
from typing import Any

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
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

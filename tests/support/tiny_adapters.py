"""Adapters of random weights for any model of `tiny_models`, strong enough to change every answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tests.support.engines import open_training

from finetune.adapters.adapter import LoraUpdate
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import read_adapter
from finetune.config.schema import LoraConfig
from finetune.engines.base import Engine


def adapt(engine: Engine, model: Path, destination: Path, *, method: str = "lora", **lora: Any) -> Path:
    """Let the engine choose modules and magnitudes, then give A, B and the magnitudes random values."""
    session = open_training(engine, model, lora=LoraConfig(**{"rank": 4, **lora}), method=method)
    destination.mkdir(parents=True, exist_ok=True)
    session.save_weights(destination)
    session.close()
    plain = read_adapter(destination)
    rng = np.random.default_rng(1)
    write_adapter(destination, replace(plain, updates={name: _random(rng, u) for name, u in plain.updates.items()}))
    return destination


def _random(rng: np.random.Generator, update: LoraUpdate) -> LoraUpdate:
    def noise(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    magnitude = update.magnitude
    if magnitude is not None:
        magnitude = (magnitude * (1 + noise(magnitude.shape) / 2)).astype(np.float32)
    return LoraUpdate(noise(update.a.shape), noise(update.b.shape), magnitude)

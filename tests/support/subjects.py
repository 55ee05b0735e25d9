"""A tiny model with three adapters of different kinds, and what tests of decoding do with them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.support.engines import open_inference
from tests.support.tiny_adapters import adapt
from tests.support.tiny_models import VOCABULARY, make_model

from finetune.core.types import TokenEvent
from finetune.engines.base import Engine, Generator, InferenceSession


@dataclass
class Subject:
    """A model, a LoRA adapter of few modules and rank 4, one of all modules and rank 8, and one with magnitudes."""

    engine: Engine
    model: Path
    adapters: dict[str, Path]

    def open(self) -> InferenceSession:
        return open_inference(self.engine, self.model, **self.adapters)


def make_subject(engine: Engine, directory: Path, kind: str) -> Subject:
    model = make_model(directory / "model", kind)
    few = ["c_proj" if kind == "gpt2" else "o_proj"]
    adapters = {
        "low": adapt(engine, model, directory / "low", rank=4, target_modules=few),
        "high": adapt(engine, model, directory / "high", rank=8),
        "dora": adapt(engine, model, directory / "dora", method="dora"),
    }
    return Subject(engine, model, adapters)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist())


def finish(generator: Generator) -> list[TokenEvent]:
    """All events of what is under way."""
    events: list[TokenEvent] = []
    while generator.busy:
        events += generator.step()
    return events

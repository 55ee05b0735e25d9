"""Training runs that are compared step by step: what they train on, and how far two of them may drift apart."""

import math
from collections.abc import Sequence

import numpy as np
from tests.support.batches import batch_of, random_rows
from tests.support.tiny_models import VOCABULARY

from finetune.core.types import Batch
from finetune.engines.base import TrainSession


def short_steps(count: int, *, rows: int = 3, distinct: int = 9, seed: int = 0) -> list[list[Batch]]:
    """`count` steps over a few rows that come again and again; each has two micro-batches of unequal token counts."""
    pool = random_rows(distinct, vocabulary=VOCABULARY, lengths=(6, 16), seed=seed)
    order = np.random.default_rng(seed).integers(0, distinct, size=(count, rows))
    chosen = [[pool[number] for number in numbers] for numbers in order]
    return [[batch_of(step[:-1], prompt=2), batch_of(step[-1:], prompt=1)] for step in chosen]


def warm_rates(count: int, peak: float) -> list[float]:
    """Five steps of warm-up, then half a cosine: a rate that is different at each step."""
    return [peak * min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / count)) for step in range(count)]


def walk(session: TrainSession, steps: Sequence[Sequence[Batch]], *, rates: Sequence[float]) -> list[float]:
    """The loss of each step before its update."""
    pending = [session.step(batches, learning_rate=rate) for batches, rate in zip(steps, rates, strict=True)]
    return [step.result().loss for step in pending]


def drift(found: Sequence[float], expected: Sequence[float]) -> np.ndarray:
    """Relative difference at every step."""
    return np.abs(np.array(found) - np.array(expected)) / np.abs(np.array(expected))

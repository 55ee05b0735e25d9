"""For every method, the same rows walk one curve however they are cut, padded, packed, recomputed or resumed.

A method joins by a line in METHODS, an arrangement by a line in ARRANGEMENTS: all pairs are compared, on both engines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.batches import batch_of, packed_batch, random_rows
from tests.support.engines import BASE, open_training
from tests.support.tiny_models import VOCABULARY
from tests.support.trajectories import drift, walk

from finetune.config.schema import LoraConfig
from finetune.core.types import Batch, FloatArray, IntArray
from finetune.engines.base import Engine, TrainSession

STEPS, HALF = 6, 3
ROWS = [random_rows(8, vocabulary=VOCABULARY, lengths=(4, 24), seed=seed) for seed in range(STEPS)]
PROMPT = 2

# Relative, of the loss of each step. float32 sums in another order differ by 1e-7, and six steps of AdamW keep that at
# 3e-7 for every method; ten times as much leaves room for other machines. Gradients of one micro-batch in eight that
# are wrong by 1 % move losses by 1e-5 or more.
MAX_DRIFT, MEAN_DRIFT = 3e-6, 1e-6
# Mean distance of the final weights, relative to the way that they went (2e-6). An element whose gradient is nearly
# zero takes a whole step of AdamW in a direction that rounding decides: a largest distance would say nothing.
WEIGHT_DRIFT = 3e-5


@dataclass(frozen=True, slots=True)
class Method:
    """How a session is opened, and the rate that it learns with."""

    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=4))
    method: str = "lora"
    base: dict[str, Any] = field(default_factory=dict)  # of the model's configuration
    rate: float = 1e-2

    def open(self, engine: Engine, model: Path, **training: Any) -> TrainSession:
        config = BASE.model_copy(update=self.base)
        return open_training(engine, model, lora=self.lora, model_config=config, method=self.method, **training)


METHODS = {
    "lora": Method(),
    "rslora": Method(LoraConfig(rank=4, use_rslora=True)),
    "dora": Method(method="dora"),
    "lora on 4 bits": Method(base={"quantization": "4bit"}),
    "dora on 8 bits": Method(method="dora", base={"quantization": "8bit"}),
    "full": Method(method="full", rate=1e-3),
}


def whole(rows: Sequence[IntArray]) -> list[Batch]:
    return [batch_of(rows, prompt=PROMPT)]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Another way of computing the same steps."""

    cut: Callable[[Sequence[IntArray]], list[Batch]] = whole
    training: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False
    exact: bool = False  # bit for bit


ARRANGEMENTS = {
    "1x8": Arrangement(lambda rows: [batch_of([row], prompt=PROMPT) for row in rows]),
    "4x2": Arrangement(lambda rows: [batch_of(rows[at : at + 2], prompt=PROMPT) for at in range(0, 8, 2)]),
    "padded": Arrangement(lambda rows: [batch_of(rows, prompt=PROMPT, width=40, pad=5)]),
    "packed": Arrangement(lambda rows: [packed_batch([rows], prompt=PROMPT)]),
    "packed in two": Arrangement(lambda rows: [packed_batch([rows[:5], rows[5:]], prompt=PROMPT)]),
    "packed 5+3": Arrangement(lambda rows: [packed_batch([part], prompt=PROMPT) for part in (rows[5:], rows[:5])]),
    "checkpointed": Arrangement(training={"gradient_checkpointing": True}),
    "resumed": Arrangement(resumed=True, exact=True),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What training gave."""

    losses: list[float]
    start: dict[str, FloatArray]
    end: dict[str, FloatArray]


def run(engine: Engine, model: Path, method: Method, how: Arrangement, folder: Path) -> Run:
    steps, rates = [how.cut(rows) for rows in ROWS], [method.rate] * STEPS
    session = method.open(engine, model, **how.training)
    start = dict(session.weights())
    losses = walk(session, steps[:HALF], rates=rates[:HALF])
    if how.resumed:
        session.save_weights(folder)
        session.save_state(folder)
        session.close()
        session = method.open(engine, model, **how.training)
        session.load_state(folder)
    losses += walk(session, steps[HALF:], rates=rates[HALF:])
    return Run(losses, start, dict(session.weights()))


def moved(run: Run) -> float:
    """Mean way of a weight."""
    return float(np.mean([np.abs(run.end[name] - run.start[name]).mean() for name in run.start]))


def apart(one: Run, other: Run) -> float:
    """Mean distance of a weight in two runs."""
    return float(np.mean([np.abs(one.end[name] - other.end[name]).mean() for name in one.end]))


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture(scope="module")
def reference(engine: Engine, llama: Path, method: Method, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All rows of a step in one padded batch."""
    return run(engine, llama, method, Arrangement(), tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_all_arrangements_walk_one_trajectory(
    engine: Engine, llama: Path, method: Method, reference: Run, arrangement: str, tmp_path: Path
) -> None:
    how = ARRANGEMENTS[arrangement]
    found = run(engine, llama, method, how, tmp_path)
    if how.exact:
        assert found.losses == reference.losses
        assert all(np.array_equal(found.end[name], reference.end[name]) for name in reference.end)
        return
    apart_by = drift(found.losses, reference.losses)
    assert apart_by.max() < MAX_DRIFT
    assert apart_by.mean() < MEAN_DRIFT
    assert apart(found, reference) < WEIGHT_DRIFT * moved(reference)


def test_the_steps_change_the_loss(reference: Run) -> None:
    """Equal curves say something only where a weight makes a difference."""
    assert moved(reference) > 1e-4
    assert np.ptp(reference.losses) > 0.05

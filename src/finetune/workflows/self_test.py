"""`ft doctor --self-test`: what finetune promises, tried out on this machine with the carried model, in a minute.

A wheel that multiplies wrongly, a driver, or a disk that loses writes shows here before it shows in a result.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from finetune.adapters.lora import seeded_init
from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.store import read_adapter
from finetune.config.schema import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from finetune.core.errors import FinetuneError
from finetune.core.types import Batch
from finetune.data.batching import BatchPlan, evaluation_batches
from finetune.data.prepare import prepare_data
from finetune.data.rows import EncodedRow
from finetune.data.tokenizer import TextTokenizer
from finetune.demo.data import DATA
from finetune.engines.base import Engine, TrainSession
from finetune.engines.registry import ENGINES, EngineChoice, is_installed, load_engine
from finetune.models.source import DEMO, DEMO_DIRECTORY

STEPS = 4
ROWS = 4  # of a step
RATE = 2e-3
SAME = 1e-5  # relative: float32 sums of the same numbers in another order, over four steps
ALIKE = 1e-4  # relative: two libraries' kernels

MODEL = ModelConfig(name=DEMO, dtype="float32")
LORA = LoraConfig(rank=8)
TRAINING = TrainingConfig(batch_size=ROWS)


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise on one engine. `detail` is what was measured, or what went wrong."""

    promise: str
    engine: str
    kept: bool
    detail: str
    seconds: float


def self_test(on_promise: Callable[[Promise], None] = lambda promise: None) -> list[Promise]:
    """Try every promise on every engine that is installed. Never fails: what goes wrong breaks its promise."""
    rows = _rows()
    engines = [load_engine(EngineChoice(name, "self-test")) for name in ENGINES if is_installed(name)]
    found: list[Promise] = []

    def add(promise: str, engine: str, check: Callable[[], tuple[bool, str]]) -> None:
        found.append(_tried(promise, engine, check))
        on_promise(found[-1])

    trials = [_Trial(engine, rows) for engine in engines]
    for trial in trials:
        add("the loss does not depend on how rows are cut and laid out", trial.engine.name, trial.same_loss)
        add("a run that is resumed walks on bit for bit", trial.engine.name, trial.exact_resume)
        add("an adapter is read back exactly, from PEFT's and from mlx-lm's files", trial.engine.name, trial.round_trip)
    if len(trials) > 1:
        names = " and ".join(engine.name for engine in engines)
        add("the engines walk the same curve", names, lambda: _same_curve(trials))
    return found


def _tried(promise: str, engine: str, check: Callable[[], tuple[bool, str]]) -> Promise:
    start = time.perf_counter()
    try:
        kept, detail = check()
    except (FinetuneError, OSError, RuntimeError, ValueError) as error:
        kept, detail = False, f"{type(error).__name__}: {error}"
    return Promise(promise, engine, kept, detail, round(time.perf_counter() - start, 2))


def _rows() -> Sequence[EncodedRow]:
    config = DataConfig(train_file=str(DATA / "test.jsonl"), validation_split=0.0)
    tokenizer = TextTokenizer.open(DEMO_DIRECTORY)
    return prepare_data(config, tokenizer=tokenizer, context_length=None, seed=0, samples=0).train


@dataclass(slots=True)
class _Trial:
    """The promises of one engine."""

    engine: Engine
    rows: Sequence[EncodedRow]
    curves: dict[str, list[float]] = field(default_factory=dict)  # the losses of the first steps, by layout

    def same_loss(self) -> tuple[bool, str]:
        """Four rows together, one after the other, and end to end."""
        layouts = {"together": (ROWS, False), "one by one": (1, False), "end to end": (ROWS, True)}
        for name, (max_rows, packing) in layouts.items():
            with self._session() as session:
                self.curves[name] = _walk(session, self._plan(max_rows, packing=packing), range(STEPS))
        together, *others = (np.array(self.curves[name]) for name in layouts)
        apart = max(float(np.max(np.abs(other - together) / together)) for other in others)
        return apart <= SAME, f"largest difference {apart:.1e}, relative"

    def exact_resume(self) -> tuple[bool, str]:
        """Half of the steps, a checkpoint, the other half; against the same in a new session."""
        plan, half = self._plan(ROWS), STEPS // 2
        with tempfile.TemporaryDirectory() as folder:
            with self._session() as session:
                _walk(session, plan, range(half))
                session.save_weights(Path(folder))
                session.save_state(Path(folder))
                expected = _walk(session, plan, range(half, STEPS)), session.weights()
            with self._session() as session:
                session.load_state(Path(folder))
                found = _walk(session, plan, range(half, STEPS)), session.weights()
        same = found[0] == expected[0] and all(np.array_equal(found[1][name], expected[1][name]) for name in found[1])
        return same, "same losses and weights" if same else f"losses {found[0]}, expected {expected[0]}"

    def round_trip(self) -> tuple[bool, str]:
        """Loss of a batch while training, and with the adapter from the disk in both layouts."""
        [batch] = evaluation_batches(self.rows[:ROWS], max_rows=ROWS, max_tokens=None, pad_id=0)
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder) / "peft", Path(folder) / "mlx-lm"
            ours.mkdir()
            with self._session() as session:
                _walk(session, self._plan(ROWS), range(STEPS))
                session.save_weights(ours)
                expected = session.loss(batch).total
            write_mlx_lm(theirs, read_adapter(ours), layers=None)
            losses = self._losses(batch, {"peft": ours, "mlx-lm": theirs})
        apart = max(abs(loss - expected) / expected for loss in losses)
        return apart <= SAME and losses[0] == losses[1], f"loss {expected:.6f} in training, {losses[0]:.6f} from files"

    def _losses(self, batch: Batch, adapters: dict[str, Path]) -> list[float]:
        with closing(self.engine.open_inference(DEMO_DIRECTORY, model_config=MODEL, adapters=adapters)) as session:
            return [session.loss(batch, adapter=name).total for name in adapters]

    @contextmanager
    def _session(self) -> Iterator[TrainSession]:
        session = self.engine.open_training(
            DEMO_DIRECTORY, model_config=MODEL, training=TRAINING, lora=LORA, init=seeded_init(0)
        )
        with closing(session):
            yield session

    def _plan(self, max_rows: int, *, packing: bool = False) -> BatchPlan:
        return BatchPlan(
            self.rows, rows_per_step=ROWS, max_rows=max_rows, max_tokens=None, seed=0, pad_id=0, packing=packing
        )


def _walk(session: TrainSession, plan: BatchPlan, steps: range) -> list[float]:
    return [session.step(plan.step(step), learning_rate=RATE).result().loss for step in steps]


def _same_curve(trials: Sequence[_Trial]) -> tuple[bool, str]:
    first, *others = (np.array(trial.curves["together"]) for trial in trials)
    apart = max(float(np.max(np.abs(other - first) / first)) for other in others)
    return apart <= ALIKE, f"largest difference of the loss {apart:.1e}, relative, over {STEPS} steps"

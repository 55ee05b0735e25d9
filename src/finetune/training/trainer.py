"""The only loop: step, evaluate, save, until the plan is done, patience ends, or somebody asks to stop.

Everything that a step depends on is a pure function of its number or stands in the checkpoint, so that a run
that was stopped anywhere and resumed does what the uninterrupted run does, bit for bit.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from signal import Signals
from typing import Protocol

from finetune.core.errors import TrainingError
from finetune.core.events import (
    CheckpointSaved,
    EvalCompleted,
    Listener,
    Notice,
    SampleGenerated,
    StepCompleted,
    StepSkipped,
)
from finetune.core.paths import ADAPTER_WEIGHTS
from finetune.core.types import Batch, StepResult
from finetune.engines.base import TrainSession
from finetune.evaluation.metrics import perplexity
from finetune.training.checkpoints import Checkpoints
from finetune.training.plan import TrainingPlan
from finetune.training.signals import StopRequest
from finetune.training.state import TrainingState
from finetune.training.validation import Measurement, Validation

MOST_SKIPPED_IN_A_ROW = 5
BYTES_PER_GB = 1e9


class StepSource(Protocol):
    """The data of each step, as a pure function of its number (`data.batching.BatchPlan`)."""

    def step(self, index: int) -> Sequence[Batch]:
        """Micro-batches of step `index`, from 0 over all epochs."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the loop ended: `completed`, `early_stopping`, or a signal's name. A checkpoint of `state` is on disk."""

    state: TrainingState
    reason: str
    signal: Signals | None = None  # set where a signal ended the run before its end


class Trainer:
    """Drives one session from `state` to the end of `plan`; tells `emit` what happens."""

    def __init__(
        self,
        session: TrainSession,
        plan: TrainingPlan,
        data: StepSource,
        *,
        validation: Validation | None,
        checkpoints: Checkpoints,
        emit: Listener,
        stop: StopRequest,
        state: TrainingState | None = None,
    ) -> None:
        self._session = session
        self._plan = plan
        self._data = data
        self._validation = validation
        self._checkpoints = checkpoints
        self._emit = emit
        self._stop = stop
        self._state = state or TrainingState()
        self._on_disk = (-1, -1) if state is None else _position(state)
        self._began = time.perf_counter() - self._state.elapsed_seconds
        self._upcoming: Sequence[Batch] | None = None

    def run(self) -> Outcome:
        """Train to the end, or to the next whole step after a request to stop, and save.

        Raises TrainingError where the loss stays not finite, where memory runs out, and where a checkpoint
        cannot be written.
        """
        try:
            self._evaluate_if_due()
            while not (self._is_complete() or self._stop.requested):
                self._step()
                self._evaluate_if_due()
                self._save_if_due()
            self._save_if_due()
        except MemoryError as error:
            raise TrainingError(_out_of_memory(self._state.step + 1)) from error
        return self._outcome()

    def _is_complete(self) -> bool:
        evaluated = self._validation is None or self._state.evaluated_step == self._state.step
        return self._out_of_patience() or (self._state.step >= self._plan.total_steps and evaluated)

    def _out_of_patience(self) -> bool:
        patience = self._plan.patience
        return patience is not None and self._state.evaluations_without_improvement >= patience

    def _outcome(self) -> Outcome:
        if not self._is_complete() and self._stop.signal is not None:
            return Outcome(self._state, self._stop.signal.name, self._stop.signal)
        return Outcome(self._state, "early_stopping" if self._state.step < self._plan.total_steps else "completed")

    def _step(self) -> None:
        index = self._state.step
        began = time.perf_counter()
        batches = self._data.step(index) if self._upcoming is None else self._upcoming
        rate = self._plan.schedule(index)
        pending = self._session.step(batches, learning_rate=rate)
        # The next batches are made while the device works on these.
        self._upcoming = self._data.step(index + 1) if index + 1 < self._plan.total_steps else None
        result = pending.result()
        seconds = time.perf_counter() - began
        tokens = sum(batch.tokens for batch in batches)
        trained = sum(batch.trained_tokens for batch in batches)
        self._advance(self._state.after_step(result, tokens=tokens, trained_tokens=trained, seconds=seconds))
        self._tell_step(result, rate, tokens, seconds)
        if self._state.consecutive_skipped >= MOST_SKIPPED_IN_A_ROW:
            self._roll_back(rate)

    def _tell_step(self, result: StepResult, rate: float, tokens: int, seconds: float) -> None:
        state = self._state
        if not result.applied:
            self._emit(StepSkipped(step=state.step, consecutive=state.consecutive_skipped))
            return
        self._emit(
            StepCompleted(
                step=state.step,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                memory_gb=state.peak_memory_bytes / BYTES_PER_GB,
                time=state.elapsed_seconds,
            )
        )

    def _evaluate_if_due(self) -> None:
        state = self._state
        if self._validation is None or state.evaluated_step == state.step or not self._plan.evaluates_at(state.step):
            return
        measurement = self._validation.measure(self._session, self._stop)
        if measurement is not None:
            self._advance(state.after_evaluation(measurement.loss, threshold=self._plan.threshold))
            self._tell_evaluation(measurement)

    def _tell_evaluation(self, measurement: Measurement) -> None:
        step = self._state.step
        loss = measurement.loss.mean
        self._emit(
            EvalCompleted(
                step=step,
                loss=loss,
                perplexity=perplexity(loss),
                accuracy=measurement.loss.accuracy,
                is_best=self._state.best_step == step,
            )
        )
        for answer in measurement.answers:
            self._emit(SampleGenerated(step=step, prompt=answer.prompt, expected=answer.expected, output=answer.output))
        if not math.isfinite(loss):
            self._emit(Notice(level="warning", message=f"The evaluation loss at step {step} is not finite."))

    def _save_if_due(self) -> None:
        state = self._state
        ends = self._is_complete() or self._stop.requested
        good = not state.consecutive_skipped  # else the weights may be what makes the loss infinite
        due = ends or (good and self._plan.saves_at(state.step)) or state.best_step == state.step
        if due and self._on_disk != _position(state):
            path = self._checkpoints.save(self._session, state)
            self._on_disk = _position(state)
            self._emit(CheckpointSaved(step=state.step, path=str(path)))

    def _advance(self, state: TrainingState) -> None:
        """Take over a new state, with clock and memory read."""
        self._state = replace(
            state,
            elapsed_seconds=time.perf_counter() - self._began,
            peak_memory_bytes=max(state.peak_memory_bytes, self._session.peak_memory_bytes()),
        )

    def _roll_back(self, rate: float) -> None:
        """Put the last checkpoint's weights back into the session, and give up with what to change."""
        last = self._state.step
        first = last - MOST_SKIPPED_IN_A_ROW + 1
        checkpoint = self._checkpoints.latest(lambda message: self._emit(Notice(level="warning", message=message)))
        if checkpoint is not None:
            self._session.load_state(checkpoint)
        place = f"The run is back at {checkpoint}." if checkpoint else "There was no checkpoint yet."
        if checkpoint is not None and (checkpoint / ADAPTER_WEIGHTS).is_file():
            place += " A new run starts with these weights where --from-adapter names that directory."
        raise TrainingError(
            f"Loss or gradient was not finite (NaN or infinite) in {MOST_SKIPPED_IN_A_ROW} steps in a row, {first} to "
            f"{last}, at a learning rate of {rate:g}. {place} Start a new run with a lower training.learning_rate "
            f"(a tenth is a good try), a lower training.max_grad_norm, or model.dtype: float32."
        )


def _position(state: TrainingState) -> tuple[int, int]:
    """What tells two states of one run apart: the steps that were done, and whether the last was evaluated."""
    return state.step, state.evaluated_step


def _out_of_memory(step: int) -> str:
    return (
        f"Memory ran out in step {step}. Lower training.batch_size (and raise training.gradient_accumulation_steps "
        f"to keep the same result), lower data.max_length, or set training.gradient_checkpointing: true."
    )

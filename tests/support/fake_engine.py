"""A small deterministic engine in NumPy, real enough that a mistake in resuming shows.

The model is a table of bigram logits with dropout that depends on (seed, step); the optimizer is Adam.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.core.types import (
    Batch,
    FloatArray,
    GenerationRequest,
    IntArray,
    LossSum,
    ParameterCount,
    RequestId,
    StepResult,
    TokenEvent,
)

VOCABULARY = 11


@dataclass(frozen=True)
class Done:
    """A step that is over when it returns."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class FakeSession:
    """Implements TrainSession. `not_finite_from` makes every step from that number on (from 1) fail."""

    def __init__(self, *, seed: int = 7, dropout: float = 0.2, not_finite_from: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 0.1, (VOCABULARY, VOCABULARY)).astype(np.float32)
        self.first = np.zeros_like(self.table)
        self.second = np.zeros_like(self.table)
        self.calls = np.zeros(1, np.int64)
        self.updates = np.zeros(1, np.int64)
        self._seed, self._dropout, self._not_finite_from = seed, dropout, not_finite_from
        self.closed = False

    @property
    def parameters(self) -> ParameterCount:
        return ParameterCount(self.table.size, self.table.size)

    @property
    def notices(self) -> Sequence[str]:
        return ()

    def step(self, micro_batches: Sequence[Batch], *, learning_rate: float) -> Done:
        self.calls += 1
        if self._not_finite_from is not None and self.calls[0] >= self._not_finite_from:
            return Done(StepResult(float("nan"), float("nan"), applied=False))
        rng = np.random.default_rng([self._seed, int(self.calls[0])])
        keep = (rng.random(self.table.shape) >= self._dropout) / (1 - self._dropout)
        table = (self.table * keep).astype(np.float32)
        total, tokens, gradient = 0.0, 0, np.zeros_like(self.table)
        for batch in micro_batches:
            probabilities, losses = _predict(table, batch)
            total += float(losses.sum())
            tokens += len(losses)
            error = probabilities.copy()
            error[np.arange(len(losses)), batch.targets[batch.loss_mask]] -= 1
            np.add.at(gradient, batch.inputs[batch.loss_mask], error)
        gradient = (gradient / tokens * keep).astype(np.float32)
        self._adam(gradient, learning_rate)
        return Done(StepResult(total / tokens, float(np.linalg.norm(gradient)), applied=True))

    def _adam(self, gradient: FloatArray, learning_rate: float) -> None:
        self.updates += 1
        count = int(self.updates[0])
        self.first = (0.9 * self.first + 0.1 * gradient).astype(np.float32)
        self.second = (0.99 * self.second + 0.01 * gradient**2).astype(np.float32)
        change = (self.first / (1 - 0.9**count)) / (np.sqrt(self.second / (1 - 0.99**count)) + 1e-8)
        self.table = (self.table - learning_rate * change).astype(np.float32)

    def loss(self, batch: Batch) -> LossSum:
        probabilities, losses = _predict(self.table, batch)
        right = probabilities.argmax(axis=1) == batch.targets[batch.loss_mask]
        return LossSum(float(losses.sum()), len(losses), int(right.sum()))

    def generator(self) -> "FakeGenerator":
        return FakeGenerator(self.table)

    def weights(self) -> Mapping[str, FloatArray]:
        return {"table": self.table}

    def save_weights(self, directory: Path) -> None:
        save_file({"table": self.table}, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    def save_state(self, directory: Path) -> None:
        state = {"first": self.first, "second": self.second, "calls": self.calls, "updates": self.updates}
        save_file(state, directory / "optimizer.safetensors")

    def load_state(self, directory: Path) -> None:
        self.table = load_file(directory / "adapter_model.safetensors")["table"]
        state = load_file(directory / "optimizer.safetensors")
        self.first, self.second = state["first"], state["second"]
        self.calls, self.updates = state["calls"], state["updates"]

    def peak_memory_bytes(self) -> int:
        return 3_000_000

    def close(self) -> None:
        self.closed = True


class FakeGenerator:
    """Greedy decoding of one request after the other."""

    def __init__(self, table: FloatArray) -> None:
        self._table = table
        self._active: dict[RequestId, tuple[int, int]] = {}
        self._count = 0

    def add(self, request: GenerationRequest) -> RequestId:
        self._count += 1
        self._active[self._count] = (request.prompt[-1], request.max_tokens)
        return self._count

    def cancel(self, request: RequestId) -> None:
        self._active.pop(request, None)

    def step(self) -> Sequence[TokenEvent]:
        events = []
        for request, (last, left) in list(self._active.items()):
            token = int(self._table[last].argmax())
            events.append(TokenEvent(request, token, 0.0, "length" if left == 1 else None))
            self._active[request] = (token, left - 1)
            if left == 1:
                del self._active[request]
        return events


def make_batch(ids: IntArray) -> Batch:
    """Rows [B, T + 1] as a batch [B, T] without padding, trained in full."""
    inputs, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return Batch(inputs, targets, np.ones(inputs.shape, np.bool_), positions, np.ones(inputs.shape, np.int32))


class CountingData:
    """A pure function of the step: each token is followed by the next one, with a little noise."""

    def __init__(self, seed: int = 3) -> None:
        self._seed = seed

    def step(self, index: int) -> tuple[Batch, ...]:
        rng = np.random.default_rng([self._seed, index])
        return tuple(make_batch(_counting_rows(rng, rows)) for rows in (2, 1))


def validation_batches() -> list[Batch]:
    """Two batches of rows that no step trains on."""
    rng = np.random.default_rng(99)
    return [make_batch(_counting_rows(rng, 3)), make_batch(_counting_rows(rng, 2))]


def _counting_rows(rng: np.random.Generator, rows: int) -> IntArray:
    ids = (rng.integers(0, VOCABULARY, (rows, 1)) + np.arange(9)) % VOCABULARY
    noise = rng.random(ids.shape) < 0.05
    return np.where(noise, rng.integers(0, VOCABULARY, ids.shape), ids).astype(np.int32)


def _predict(table: FloatArray, batch: Batch) -> tuple[FloatArray, FloatArray]:
    """Probabilities [N, V] and losses [N] of the trained tokens."""
    logits = table[batch.inputs[batch.loss_mask]]
    shifted = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    targets = batch.targets[batch.loss_mask]
    losses = -np.log(probabilities[np.arange(len(targets)), targets])
    return probabilities.astype(np.float32), losses.astype(np.float32)

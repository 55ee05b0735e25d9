"""The training session: gradients summed over micro-batches, one guarded update, and a state that resumes exactly."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from finetune.config.schema import TrainingConfig
from finetune.core.errors import TrainingError
from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount, StepResult
from finetune.engines.base import Generator
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.documents import Arranged, arrange_for_workers
from finetune.engines.mlx.generate import make_generator
from finetune.engines.mlx.loss import gather, summed_loss
from finetune.engines.mlx.optimizer import Optimizer
from finetune.engines.mlx.resident import TrainedModel
from finetune.engines.mlx.scoring import batch_loss, calls_of
from finetune.engines.mlx.trainable import Trainable, Weights
from finetune.engines.mlx.workers import Workers, useful_workers
from finetune.engines.state_file import read_state, write_state


def _added(first: tuple[Any, Weights], second: tuple[Any, Weights]) -> tuple[Any, Weights]:
    gradients = {name: first[1][name] + second[1][name] for name in first[1]}
    return first[0] + second[0], gradients


@dataclass(frozen=True, slots=True)
class MLXPendingStep:
    """A step that the device is computing."""

    loss: Any
    norm: Any
    applied: Any

    def result(self) -> StepResult:
        with explained_memory():
            mx.eval(self.loss, self.norm, self.applied)
        return StepResult(float(self.loss.item()), float(self.norm.item()), bool(self.applied.item()))


class MLXTrainSession:
    """Implements `TrainSession` over a `Trainable`."""

    def __init__(self, trainable: Trainable, training: TrainingConfig) -> None:
        mx.reset_peak_memory()
        self._trainable = trainable
        self._base = trainable.base
        self._seed = training.seed
        self._weights: Weights = trainable.initial()
        self._optimizer = Optimizer(training, trainable.decays)
        self._state = self._optimizer.initial_state(self._weights)
        self._calls = 0
        self._summed = summed_loss(self._base.split.head, self._base.vocabulary, training.label_smoothing)
        self._gradient = mx.value_and_grad(self._loss)
        self._workers = Workers(useful_workers(training, on_cpu=compat.on_cpu()))
        mx.eval(self._weights, self._state)

    @property
    def parameters(self) -> ParameterCount:
        return ParameterCount(sum(array.size for array in self._weights.values()), self._trainable.total)

    @property
    def notices(self) -> Sequence[str]:
        return self._base.notices

    def step(self, micro_batches: Sequence[Batch], *, learning_rate: float) -> MLXPendingStep:
        micro_batches = [batch for batch in micro_batches if batch.trained_tokens]
        tokens = sum(batch.trained_tokens for batch in micro_batches)
        if not tokens:
            raise TrainingError("A step has no token to train on. Check the loss masks with `ft dataset inspect`.")
        with explained_memory():
            total, gradients = self._sums(micro_batches)
            updated = self._optimizer.update(
                self._weights,
                gradients,
                self._state,
                loss=total,
                tokens=mx.array(float(tokens)),
                learning_rate=mx.array(learning_rate, mx.float32),
            )
            self._weights, self._state = updated.weights, updated.state
            self._trainable.bind(self._weights)  # else the model keeps the old weights in memory
            self._calls += 1
            mean = total / tokens
            mx.async_eval(self._weights, self._state, mean, updated.norm, updated.applied)  # type: ignore[no-untyped-call]
        return MLXPendingStep(mean, updated.norm, updated.applied)

    def _sums(self, micro_batches: Sequence[Batch]) -> tuple[Any, Weights]:
        """(loss, gradients), summed over all trained tokens."""
        split = self._base.split
        if self._workers.count == 1 or not split.takes_documents:
            calls = [call for batch in micro_batches for call in calls_of(self._base, batch)]
            for sums in self._running_sums(enumerate(calls)):
                mx.async_eval(sums)  # type: ignore[no-untyped-call] # one micro-batch's activations in memory at a time
            return sums
        mx.eval(self._weights)
        hands = arrange_for_workers(micro_batches, layers=split.layers, workers=self._workers.count)
        numbered, number = [], 0
        for hand in hands:
            numbered.append(list(enumerate(hand, start=number)))
            number += len(hand)
        builds = [lambda calls=calls: list(self._running_sums(calls)) for calls in numbered]
        parts = [chain[-1] for chain in self._workers.evaluate(builds)]
        return reduce(_added, parts)

    def _running_sums(self, calls: Iterable[tuple[int, Arranged]]) -> Iterator[tuple[Any, Weights]]:
        """(loss, gradients) of the calls up to each, by their numbers within the step; nothing is computed yet."""
        sums: tuple[Any, Weights] | None = None
        for number, call in calls:
            part = self._micro_batch(call, number)
            sums = part if sums is None else _added(sums, part)
            yield sums

    def _micro_batch(self, call: Arranged, number: int) -> tuple[Any, Weights]:
        """(summed loss, its gradients); the dropout key is a function of seed, step and micro-batch."""
        key = mx.array(np.random.SeedSequence([self._seed, self._calls, number]).generate_state(2))
        loss, gradients = self._gradient(self._weights, call, key)
        return loss, gradients

    def _loss(self, weights: Weights, call: Arranged, key: Any) -> Any:
        self._trainable.bind(weights, key)
        hidden = gather(self._base.split.body(call.inputs, cache=call.cache), call.positions)
        head = self._trainable.head_parameters(weights)
        return self._summed(hidden, call.positions.targets, *head)

    def loss(self, batch: Batch) -> LossSum:
        self._trainable.bind(self._weights)
        return batch_loss(self._base, batch)

    def generator(self) -> Generator:
        self._trainable.bind(self._weights)
        return make_generator(TrainedModel(self._base))

    def weights(self) -> Mapping[str, FloatArray]:
        return {name: np.array(array) for name, array in self._weights.items()}

    def save_weights(self, directory: Path) -> None:
        self._trainable.save(self._weights, directory)

    def save_state(self, directory: Path) -> None:
        masters = {} if self._trainable.exact else self.weights()
        write_state(directory, {name: np.array(array) for name, array in self._state.items()}, masters, self._calls)

    def load_state(self, directory: Path) -> None:
        found = read_state(directory, {name: array.shape for name, array in self._state.items()})
        masters = {name: mx.array(array) for name, array in found.masters.items()}
        weights = masters or self._trainable.load(directory)
        self._weights = {name: weights[name] for name in self._weights}
        self._state = {name: mx.array(found.optimizer[name]) for name in self._state}
        self._calls = found.calls
        self._trainable.bind(self._weights)
        mx.eval(self._weights, self._state)

    def peak_memory_bytes(self) -> int:
        return int(mx.get_peak_memory())

    def close(self) -> None:
        del self._weights, self._state, self._trainable, self._base, self._gradient, self._summed
        mx.clear_cache()

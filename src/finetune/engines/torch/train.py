"""The training session: gradients summed over micro-batches, one guarded update, and a state that resumes exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.schema import TrainingConfig
from finetune.core.errors import TrainingError
from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount, StepResult
from finetune.engines.base import Generator
from finetune.engines.state_file import read_state, write_state
from finetune.engines.torch import compat
from finetune.engines.torch.device import PeakMemory, explained_memory
from finetune.engines.torch.documents import flatten
from finetune.engines.torch.generate import make_generator
from finetune.engines.torch.loss import summed_loss
from finetune.engines.torch.optimizer import Optimizer
from finetune.engines.torch.resident import TrainedModel
from finetune.engines.torch.scoring import batch_loss
from finetune.engines.torch.trainable import Trainable


@dataclass(frozen=True, slots=True)
class TorchPendingStep:
    """A step that the device is computing."""

    loss: Tensor
    norm: Tensor
    applied: Tensor

    def result(self) -> StepResult:
        with explained_memory():
            return StepResult(float(self.loss), float(self.norm), bool(self.applied))


class TorchTrainSession:
    """Implements `TrainSession` over a `Trainable`.

    The same steps give the same bits on one machine with the same number of threads: on the CPU every operation of
    the step adds in a fixed order, and on CUDA PyTorch is told to use kernels that do. On Metal nothing is promised.
    """

    def __init__(self, trainable: Trainable, training: TrainingConfig) -> None:
        self._trainable = trainable
        self._base = trainable.base
        compat.fix_order_of_sums(self._base.device)
        self._memory = PeakMemory(self._base.device)
        self._seed = training.seed
        self._smoothing = training.label_smoothing
        self._masters = trainable.masters
        self._optimizer = Optimizer(training, self._masters)
        self._calls = 0

    @property
    def parameters(self) -> ParameterCount:
        return ParameterCount(len(self._masters.weights), self._trainable.total)

    @property
    def notices(self) -> Sequence[str]:
        return self._base.notices

    def step(self, micro_batches: Sequence[Batch], *, learning_rate: float) -> TorchPendingStep:
        micro_batches = [batch for batch in micro_batches if batch.trained_tokens]
        tokens = sum(batch.trained_tokens for batch in micro_batches)
        if not tokens:
            raise TrainingError("A step has no token to train on. Check the loss masks with `ft dataset inspect`.")
        with explained_memory():
            self._masters.gradients.zero_()
            total = torch.zeros((), device=self._base.device)
            for number, batch in enumerate(micro_batches):
                total += self._micro_batch(batch, number)
            self._trainable.draw_dropout(None)
            updated = self._optimizer.update(loss=total, tokens=tokens, learning_rate=learning_rate)
            self._trainable.refresh()
            self._calls += 1
        return TorchPendingStep(total / tokens, updated.norm, updated.applied)

    def _micro_batch(self, batch: Batch, number: int) -> Tensor:
        """The summed loss; gradients are added to the masters'. Dropout follows seed, step and micro-batch."""
        self._trainable.draw_dropout((self._seed, self._calls, number))
        flat = flatten(batch, self._base.device)
        hidden = self._base.split.body(flat).index_select(0, flat.rows)
        loss = summed_loss(self._base.split.head, hidden, flat.targets, self._smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def loss(self, batch: Batch) -> LossSum:
        return batch_loss(self._base, batch)

    def generator(self) -> Generator:
        return make_generator(TrainedModel(self._base))

    def weights(self) -> Mapping[str, FloatArray]:
        return _as_arrays(self._masters.views(self._masters.weights))

    def save_weights(self, directory: Path) -> None:
        self._trainable.save(directory)

    def save_state(self, directory: Path) -> None:
        masters = {} if self._trainable.exact else self.weights()
        write_state(directory, _as_arrays(self._optimizer.state), masters, self._calls)

    def load_state(self, directory: Path) -> None:
        shapes = {name: tuple(value.shape) for name, value in self._optimizer.state.items()}
        found = read_state(directory, shapes)
        masters = {name: torch.from_numpy(array) for name, array in found.masters.items()}
        self._masters.set(masters or self._trainable.load(directory))
        for name, value in self._optimizer.state.items():
            value.copy_(torch.from_numpy(found.optimizer[name]))
        self._trainable.refresh()
        self._calls = found.calls

    def peak_memory_bytes(self) -> int:
        return self._memory.bytes()

    def close(self) -> None:
        del self._trainable, self._base, self._masters, self._optimizer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, FloatArray]:
    """Copies on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in tensors.items()}

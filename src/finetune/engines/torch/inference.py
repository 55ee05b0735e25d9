"""One base in memory with any number of adapters; each call says which of them answers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount
from finetune.engines.base import Generator
from finetune.engines.decoding import adapter_called
from finetune.engines.torch.adapters import make_adaptable, on_device, read_for
from finetune.engines.torch.generate import TorchGenerator
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.scoring import batch_distributions, batch_logprobs, batch_loss
from finetune.engines.torch.trainable import count_parameters


class TorchInferenceSession:
    """Implements `InferenceSession`."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, directory) for name, directory in adapters.items()}
        total = count_parameters(base.model)
        adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._base, self._slot = adaptable.base, adaptable.slot
        self._adapters = {name: on_device(adapter, base.device) for name, adapter in read.items()}
        trainable = sum(adapter.parameters for adapter in read.values())
        self._parameters = ParameterCount(trainable, total + trainable)

    @property
    def parameters(self) -> ParameterCount:
        return self._parameters

    def loss(self, batch: Batch, *, adapter: str | None = None) -> LossSum:
        self._select(adapter)
        return batch_loss(self._base, batch)

    def token_logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        self._select(adapter)
        return batch_logprobs(self._base, batch)

    def logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        self._select(adapter)
        return batch_distributions(self._base, batch)

    def generator(self) -> Generator:
        return TorchGenerator(self._base, self._select)

    def _select(self, adapter: str | None) -> None:
        self._slot.active = adapter_called(adapter, self._adapters)

    def close(self) -> None:
        del self._base, self._slot, self._adapters
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

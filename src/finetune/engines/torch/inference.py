"""One base in memory with any number of adapters; each call says which of them answers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount
from finetune.engines.base import Generator
from finetune.engines.decoding import adapter_called, require_free_name
from finetune.engines.torch.adapters import adapt_more, make_adaptable, on_device, read_for
from finetune.engines.torch.generate import TorchGenerator
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.scoring import batch_distributions, batch_logprobs, batch_loss
from finetune.engines.torch.trainable import count_parameters


class TorchInferenceSession:
    """Implements `InferenceSession`."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, directory) for name, directory in adapters.items()}
        self._frozen = count_parameters(base.model)
        self._adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._adapters = {name: on_device(adapter, base.device) for name, adapter in read.items()}
        self._sizes = {name: adapter.parameters for name, adapter in read.items()}

    @property
    def _base(self) -> BaseModel:
        return self._adaptable.base

    @property
    def parameters(self) -> ParameterCount:
        trainable = sum(self._sizes.values())
        return ParameterCount(trainable, self._frozen + trainable)

    def load_adapter(self, name: str, directory: Path) -> None:
        require_free_name(name, self._adapters)
        adapter = read_for(self._base.model, directory)
        self._adaptable = adapt_more(self._adaptable, set(adapter.updates))
        self._adapters[name] = on_device(adapter, self._base.device)
        self._sizes[name] = adapter.parameters

    def unload_adapter(self, name: str) -> None:
        adapter_called(name, self._adapters)
        del self._adapters[name], self._sizes[name]

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
        self._adaptable.slot.active = adapter_called(adapter, self._adapters)

    def close(self) -> None:
        del self._adaptable, self._adapters
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

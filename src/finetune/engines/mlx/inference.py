"""One base in memory with any number of adapters; each call says which of them answers."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from finetune.adapters.adapter import Adapter
from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount
from finetune.engines.base import Generator
from finetune.engines.decoding import adapter_called
from finetune.engines.mlx.adapters import make_adaptable, on_device, read_for
from finetune.engines.mlx.dora import row_norms
from finetune.engines.mlx.generate import MLXGenerator
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.scoring import batch_distributions, batch_logprobs, batch_loss
from finetune.engines.mlx.trainable import count_parameters


class MLXInferenceSession:
    """Implements `InferenceSession`."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, base.layout, directory) for name, directory in adapters.items()}
        total = count_parameters(base.model)
        adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._base, self._slot = adaptable.base, adaptable.slot
        norms = row_norms({module: adaptable.layers[module] for module in _with_magnitude(read.values())})
        self._adapters = {name: on_device(adapter, norms) for name, adapter in read.items()}
        mx.eval([list(adapter.values()) for adapter in self._adapters.values()])
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
        return MLXGenerator(self._base, self._select)

    def _select(self, adapter: str | None) -> None:
        self._slot.active = adapter_called(adapter, self._adapters)

    def close(self) -> None:
        del self._base, self._slot, self._adapters
        mx.clear_cache()


def _with_magnitude(adapters: Iterable[Adapter]) -> set[str]:
    """Modules that some adapter updates as DoRA does."""
    updates = (item for adapter in adapters for item in adapter.updates.items())
    return {module for module, update in updates if update.magnitude is not None}

"""One base in memory with any number of adapters; each call says which of them answers."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from finetune.adapters.adapter import Adapter
from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount
from finetune.engines.base import Generator
from finetune.engines.decoding import adapter_called, require_free_name
from finetune.engines.mlx.adapters import adapt_more, make_adaptable, on_device, read_for
from finetune.engines.mlx.dora import row_norms
from finetune.engines.mlx.generate import MLXGenerator
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.lora import LoraWeights
from finetune.engines.mlx.scoring import batch_distributions, batch_logprobs, batch_loss
from finetune.engines.mlx.trainable import count_parameters


class MLXInferenceSession:
    """Implements `InferenceSession`."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, base.layout, directory) for name, directory in adapters.items()}
        self._frozen = count_parameters(base.model)
        self._adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._adapters: dict[str, Mapping[str, LoraWeights]] = {}
        self._sizes: dict[str, int] = {}
        self._put(read)

    @property
    def _base(self) -> BaseModel:
        return self._adaptable.base

    @property
    def parameters(self) -> ParameterCount:
        trainable = sum(self._sizes.values())
        return ParameterCount(trainable, self._frozen + trainable)

    def load_adapter(self, name: str, directory: Path) -> None:
        require_free_name(name, self._adapters)
        adapter = read_for(self._base.model, self._base.layout, directory)
        self._adaptable = adapt_more(self._adaptable, set(adapter.updates))
        self._put({name: adapter})

    def unload_adapter(self, name: str) -> None:
        adapter_called(name, self._adapters)
        del self._adapters[name], self._sizes[name]

    def _put(self, adapters: Mapping[str, Adapter]) -> None:
        """Move adapters to the device."""
        norms = row_norms({module: self._adaptable.layers[module] for module in _with_magnitude(adapters.values())})
        loaded = {name: on_device(adapter, norms) for name, adapter in adapters.items()}
        mx.eval([list(adapter.values()) for adapter in loaded.values()])
        self._adapters.update(loaded)
        self._sizes.update({name: adapter.parameters for name, adapter in adapters.items()})

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
        self._adaptable.slot.active = adapter_called(adapter, self._adapters)

    def close(self) -> None:
        del self._adaptable, self._adapters
        mx.clear_cache()


def _with_magnitude(adapters: Iterable[Adapter]) -> set[str]:
    """Modules that some adapter updates as DoRA does."""
    updates = (item for adapter in adapters for item in adapter.updates.items())
    return {module for module, update in updates if update.magnitude is not None}

"""One base in memory with any number of adapters; each call says which of them answers."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount
from finetune.engines.base import Generator
from finetune.engines.mlx.generate import RowCache, make_generator
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.resident import ResidentAdapters
from finetune.engines.mlx.scoring import batch_distributions, batch_logprobs, batch_loss
from finetune.engines.mlx.trainable import count_parameters
from finetune.engines.prefixes import PrefixCache


class MLXInferenceSession:
    """Implements `InferenceSession`."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        self._frozen = count_parameters(base.model)
        self._model = ResidentAdapters(base, adapters)
        self._prefixes: PrefixCache[RowCache] = PrefixCache()

    @property
    def parameters(self) -> ParameterCount:
        return ParameterCount(self._model.parameters, self._frozen + self._model.parameters)

    def load_adapter(self, name: str, directory: Path) -> None:
        self._model.load(name, directory)

    def unload_adapter(self, name: str) -> None:
        self._prefixes.forget(self._model.unload(name))

    def loss(self, batch: Batch, *, adapter: str | None = None) -> LossSum:
        return batch_loss(self._adapted(adapter), batch)

    def token_logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        return batch_logprobs(self._adapted(adapter), batch)

    def logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        return batch_distributions(self._adapted(adapter), batch)

    def generator(self) -> Generator:
        return make_generator(self._model, self._prefixes)

    def _adapted(self, adapter: str | None) -> BaseModel:
        """The base, computing with an adapter."""
        self._model.use(self._model.updates([self._model.adapter(adapter)]))
        return self._model.base

    def close(self) -> None:
        del self._model, self._prefixes
        mx.clear_cache()

"""One base in memory with any number of adapters; each call says which of them answers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.core.types import Batch, FloatArray, LossSum, ParameterCount
from finetune.engines.base import Generator
from finetune.engines.prefixes import PrefixCache
from finetune.engines.torch.generate import Prompt, make_generator
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.resident import ResidentAdapters
from finetune.engines.torch.scoring import batch_distributions, batch_logprobs, batch_loss


class TorchInferenceSession:
    """Implements `InferenceSession`."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        self._adapters = ResidentAdapters(base, adapters)
        self._prefixes: PrefixCache[Prompt] = PrefixCache()

    @property
    def parameters(self) -> ParameterCount:
        return self._adapters.parameters

    def load_adapter(self, name: str, directory: Path) -> None:
        self._adapters.load(name, directory)

    def unload_adapter(self, name: str) -> None:
        self._prefixes.forget(self._adapters.unload(name))

    def loss(self, batch: Batch, *, adapter: str | None = None) -> LossSum:
        self._adapters.select(adapter)
        return batch_loss(self._adapters.base, batch)

    def token_logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        self._adapters.select(adapter)
        return batch_logprobs(self._adapters.base, batch)

    def logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        self._adapters.select(adapter)
        return batch_distributions(self._adapters.base, batch)

    def generator(self) -> Generator:
        return make_generator(self._adapters, self._prefixes)

    def close(self) -> None:
        del self._adapters, self._prefixes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

"""A base with adapters that come and go, and which of them the calls under way take."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.adapters.adapter import Adapter
from finetune.core.types import ParameterCount
from finetune.engines.decoding import adapter_called, require_free_name
from finetune.engines.torch.adapters import adapt_more, make_adaptable, on_device, read_for
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.mixture import AdapterWeights, Mixture
from finetune.engines.torch.trainable import count_parameters


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter on the device: unlike any other, also one that is loaded later under its name."""

    weights: AdapterWeights
    parameters: int


class LoadedAdapters:
    """Implements `Weights` over a base and adapters by name."""

    def __init__(self, base: BaseModel, directories: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, directory) for name, directory in directories.items()}
        self._frozen = count_parameters(base.model)
        self._adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._loaded = {name: self._on_device(adapter) for name, adapter in read.items()}
        self._mixed: list[LoadedAdapter] = []
        self._mixture = Mixture(())

    @property
    def base(self) -> BaseModel:
        return self._adaptable.base

    @property
    def parameters(self) -> ParameterCount:
        """`trainable` counts those of the adapters."""
        trainable = sum(adapter.parameters for adapter in self._loaded.values())
        return ParameterCount(trainable, self._frozen + trainable)

    def add(self, name: str, directory: Path) -> None:
        """Load an adapter. Raises UsageError for a name that is taken, ModelError for files that do not fit."""
        require_free_name(name, self._loaded)
        adapter = read_for(self.base.model, directory)
        self._adaptable = adapt_more(self._adaptable, set(adapter.updates))
        self._loaded[name] = self._on_device(adapter)

    def remove(self, name: str) -> LoadedAdapter:
        """Forget an adapter, which rows under way keep. Raises UsageError where there is none."""
        self._weights(name)
        return self._loaded.pop(name)

    def select(self, name: str | None) -> None:
        """Let all tokens of further calls take the named adapter. Raises UsageError where there is none."""
        self._adaptable.slot.active = self._weights(name)

    def named(self, name: str | None) -> Hashable:
        self._weights(name)
        return None if name is None else self._loaded[name]

    @contextmanager
    def taken(self, adapters: Sequence[Hashable]) -> Iterator[None]:
        slot = self._adaptable.slot
        slot.active = {}
        slot.mixed = self._mixture_of(adapters)
        try:
            yield
        finally:
            slot.mixed = None

    def _mixture_of(self, adapters: Sequence[Hashable]) -> Mixture | None:
        """The mixture with each token's adapter; None where all take the base. It is made anew for other adapters."""
        present = [adapter for adapter in dict.fromkeys(adapters) if isinstance(adapter, LoadedAdapter)]
        if not present:
            return None
        if set(present) != set(self._mixed):
            self._mixed, self._mixture = present, Mixture([adapter.weights for adapter in present])
        numbers: dict[Hashable, int] = {adapter: number for number, adapter in enumerate(self._mixed)}
        self._mixture.assign([numbers.get(adapter, len(numbers)) for adapter in adapters], self.base.device)
        return self._mixture

    def _weights(self, name: str | None) -> AdapterWeights:
        return adapter_called(name, {loaded: adapter.weights for loaded, adapter in self._loaded.items()})

    def _on_device(self, adapter: Adapter) -> LoadedAdapter:
        return LoadedAdapter(on_device(adapter, self.base.device), adapter.parameters)

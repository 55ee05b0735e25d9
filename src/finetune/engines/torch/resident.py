"""Adapters that lie beside one base in memory, and what each token of a call gets of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.adapters.adapter import Adapter
from finetune.core.types import ParameterCount
from finetune.engines.decoding import adapter_called, require_free_name
from finetune.engines.torch.adapters import adapt_more, make_adaptable, on_device, read_for
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.lora import LoraWeights
from finetune.engines.torch.mixed import MixedUpdates
from finetune.engines.torch.trainable import count_parameters


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter on the device. One that is loaded again is another."""

    weights: Mapping[str, LoraWeights]  # by module name
    parameters: int


BASE = LoadedAdapter({}, 0)


class AdaptedModel(Protocol):
    """A model whose rows may have different adapters."""

    @property
    def base(self) -> BaseModel:
        """The model as it is now: loading an adapter may change its parts."""
        ...

    def adapter(self, name: str | None) -> LoadedAdapter:
        """The adapter of that name, None for the base. Raises UsageError where there is none."""
        ...

    def using(self, tokens: Sequence[LoadedAdapter], beside: Iterable[LoadedAdapter]) -> AbstractContextManager[None]:
        """Within it, each token of a call takes its adapter. Other calls, before and after, take those of `beside`."""
        ...


class ResidentAdapters:
    """Implements `AdaptedModel` over a base in which any number of adapters is loaded and unloaded."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, directory) for name, directory in adapters.items()}
        self._frozen = count_parameters(base.model)
        self._adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._loaded: dict[str, LoadedAdapter] = {}
        self._mixed: tuple[list[LoadedAdapter], MixedUpdates] = ([], MixedUpdates(()))
        self._put(read)

    @property
    def base(self) -> BaseModel:
        return self._adaptable.base

    @property
    def parameters(self) -> ParameterCount:
        """`trainable` counts those of all loaded adapters."""
        trainable = sum(adapter.parameters for adapter in self._loaded.values())
        return ParameterCount(trainable, self._frozen + trainable)

    def adapter(self, name: str | None) -> LoadedAdapter:
        return BASE if name is None else adapter_called(name, self._loaded)

    def load(self, name: str, directory: Path) -> None:
        """Read an adapter's files. Raises UsageError for a name that is taken, ModelError for what does not fit."""
        require_free_name(name, self._loaded)
        adapter = read_for(self.base.model, directory)
        self._adaptable = adapt_more(self._adaptable, set(adapter.updates))
        self._put({name: adapter})

    def unload(self, name: str) -> LoadedAdapter:
        """Forget an adapter; rows that have it go on."""
        adapter = self.adapter(name)
        del self._loaded[name]
        return adapter

    def _put(self, adapters: Mapping[str, Adapter]) -> None:
        for name, adapter in adapters.items():
            self._loaded[name] = LoadedAdapter(on_device(adapter, self.base.device), adapter.parameters)

    def select(self, name: str | None) -> None:
        """Let all tokens of further calls take one adapter. Raises UsageError where there is none of that name."""
        self._adaptable.slot.active = self.adapter(name).weights

    @contextmanager
    def using(self, tokens: Sequence[LoadedAdapter], beside: Iterable[LoadedAdapter]) -> Iterator[None]:
        slot = self._adaptable.slot
        slot.active = {}
        slot.mixed = self._updates(tokens, beside)
        try:
            yield
        finally:
            slot.mixed = None

    def _updates(self, tokens: Sequence[LoadedAdapter], beside: Iterable[LoadedAdapter]) -> MixedUpdates | None:
        """What each token gets; None where all take the base."""
        if all(adapter is BASE for adapter in tokens):
            return None
        members, updates = self._stacked(
            [adapter for adapter in dict.fromkeys((*tokens, *beside)) if adapter is not BASE]
        )
        numbers = {adapter: number for number, adapter in enumerate(members)}
        updates.assign([numbers.get(adapter, len(members)) for adapter in tokens], self.base.device)
        return updates

    def _stacked(self, adapters: list[LoadedAdapter]) -> tuple[list[LoadedAdapter], MixedUpdates]:
        """The adapters side by side; those of the last stack serve again while they hold all that are wanted."""
        members, _ = self._mixed
        if not set(adapters) <= set(members) or len(members) > 2 * len(adapters):
            self._mixed = (adapters, MixedUpdates([adapter.weights for adapter in adapters]))
        return self._mixed


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Implements `AdaptedModel` for what is being trained: its weights are in the model after every step."""

    base: BaseModel

    def adapter(self, name: str | None) -> LoadedAdapter:
        return BASE if name is None else adapter_called(name, {})

    def using(self, tokens: Sequence[LoadedAdapter], beside: Iterable[LoadedAdapter]) -> AbstractContextManager[None]:
        """Nothing to do: the weights stay bound."""
        return nullcontext()

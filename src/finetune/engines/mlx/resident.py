"""Adapters that lie beside one base in memory, and what each row of a batch gets of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from finetune.adapters.adapter import Adapter
from finetune.engines.decoding import adapter_called, require_free_name
from finetune.engines.mlx.adapters import adapt_more, make_adaptable, on_device, read_for
from finetune.engines.mlx.dora import row_norms
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.mixed import StackedUpdates, by_itself, for_rows, stack
from finetune.engines.mlx.sharing import rows_can_share


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter on the device. One that is loaded again is another."""

    updates: Mapping[str, StackedUpdates]  # by itself
    parameters: int


BASE = LoadedAdapter({}, 0)
_IDLE = 8  # adapters in a stack that no row has: they cost less than stacking again


class AdaptedModel(Protocol):
    """A model whose rows may have different adapters."""

    @property
    def base(self) -> BaseModel:
        """The model as it is now: loading an adapter may change its parts."""
        ...

    @property
    def rows_share(self) -> bool:
        """Whether rows of different lengths can be decoded in one pass."""
        ...

    def adapter(self, name: str | None) -> LoadedAdapter:
        """The adapter of that name, None for the base. Raises UsageError where there is none."""
        ...

    def updates(self, rows: Sequence[LoadedAdapter]) -> Mapping[str, Any]:
        """What the LoRA layers add in a batch of these rows."""
        ...

    def use(self, updates: Mapping[str, Any]) -> None:
        """Compute with these updates from here on."""
        ...


class ResidentAdapters:
    """Implements `AdaptedModel` over a base in which any number of adapters is loaded and unloaded."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, Path]) -> None:
        read = {name: read_for(base.model, base.layout, directory) for name, directory in adapters.items()}
        self._adaptable = make_adaptable(base, {module for adapter in read.values() for module in adapter.updates})
        self._loaded: dict[str, LoadedAdapter] = {}
        self._stacked: tuple[list[LoadedAdapter], Mapping[str, StackedUpdates]] = ([], {})
        self._put(read)

    @property
    def base(self) -> BaseModel:
        return self._adaptable.base

    @cached_property
    def rows_share(self) -> bool:
        self.use({})
        return rows_can_share(self.base)

    @property
    def parameters(self) -> int:
        """Of all loaded adapters."""
        return sum(adapter.parameters for adapter in self._loaded.values())

    def adapter(self, name: str | None) -> LoadedAdapter:
        return BASE if name is None else adapter_called(name, self._loaded)

    def load(self, name: str, directory: Path) -> None:
        """Read an adapter's files. Raises UsageError for a name that is taken, ModelError for what does not fit."""
        require_free_name(name, self._loaded)
        adapter = read_for(self.base.model, self.base.layout, directory)
        self._adaptable = adapt_more(self._adaptable, set(adapter.updates))
        self._put({name: adapter})

    def unload(self, name: str) -> LoadedAdapter:
        """Forget an adapter; rows that have it go on."""
        adapter = self.adapter(name)
        del self._loaded[name]
        self._stacked = ([], {})
        return adapter

    def _put(self, adapters: Mapping[str, Adapter]) -> None:
        norms = row_norms({module: self._adaptable.layers[module] for module in _with_magnitude(adapters.values())})
        for name, adapter in adapters.items():
            updates = by_itself(on_device(adapter, norms))
            mx.eval([[update.a, update.b, update.ratios] for update in updates.values()])
            self._loaded[name] = LoadedAdapter(updates, adapter.parameters)

    def updates(self, rows: Sequence[LoadedAdapter]) -> Mapping[str, Any]:
        distinct = list(dict.fromkeys(rows))
        if len(distinct) == 1:
            return for_rows(distinct[0].updates, np.zeros(len(rows), np.int32))
        members, stacked = self._stack([adapter for adapter in distinct if adapter is not BASE])
        numbers = {adapter: number for number, adapter in enumerate(members)}
        return for_rows(stacked, np.array([numbers.get(adapter, -1) for adapter in rows], np.int32))

    def _stack(self, adapters: Sequence[LoadedAdapter]) -> tuple[list[LoadedAdapter], Mapping[str, StackedUpdates]]:
        """The adapters side by side; those of the last stack serve again where they hold all that are wanted."""
        members, _ = self._stacked
        if not set(adapters) <= set(members) or len(members) > len(adapters) + _IDLE:
            stacked = stack([adapter.updates for adapter in adapters])
            mx.eval([[update.a, update.b] for update in stacked.values()])
            self._stacked = (list(adapters), stacked)
        return self._stacked

    def use(self, updates: Mapping[str, Any]) -> None:
        self._adaptable.slot.active = updates


class TrainedModel:
    """Implements `AdaptedModel` for what is being trained: its weights are in the model after every step."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @cached_property
    def rows_share(self) -> bool:
        return rows_can_share(self.base)

    def adapter(self, name: str | None) -> LoadedAdapter:
        return BASE if name is None else adapter_called(name, {})

    def updates(self, rows: Sequence[LoadedAdapter]) -> Mapping[str, Any]:
        return {}

    def use(self, updates: Mapping[str, Any]) -> None:
        """Nothing to do: the weights stay bound."""


def _with_magnitude(adapters: Iterable[Adapter]) -> set[str]:
    """Modules that some adapter updates as DoRA does."""
    updates = (item for adapter in adapters for item in adapter.updates.items())
    return {module for module, update in updates if update.magnitude is not None}

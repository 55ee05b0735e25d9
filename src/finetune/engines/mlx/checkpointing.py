"""Gradient checkpointing: a layer's activations are computed again in its backward pass instead of kept.

The gradient that a layer passes down comes after those of its weights, which need what was recomputed.

`mx.checkpoint` differentiates explicit arguments only, so a layer's trained weights are handed to it as such. Each
layer object gets a class of its own: the model's classes, which other sessions share, stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from finetune.engines.mlx.lora import LoraSlot
from finetune.engines.mlx.ordering import weights_first


class LayerWeights(Protocol):
    """The trained weights of one layer, as the call under way has bound them."""

    def get(self) -> list[Any]:
        """The arrays, in an order that stays."""
        ...

    def set(self, arrays: Sequence[Any]) -> None:
        """Compute with other arrays, in the order of `get`, from here on."""
        ...


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The adapters of one layer."""

    slot: LoraSlot
    modules: Sequence[str]

    def get(self) -> list[Any]:
        return [array for module in self.modules for array in self.slot.active[module].trained().values()]

    def set(self, arrays: Sequence[Any]) -> None:
        given = iter(arrays)
        active = dict(self.slot.active)
        for module in self.modules:
            update = active[module]
            active[module] = update._replace(**{name: next(given) for name in update.trained()})
        self.slot.active = active


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """Every weight of one layer."""

    layer: Any

    def get(self) -> list[Any]:
        return [array for _, array in self._named()]

    def set(self, arrays: Sequence[Any]) -> None:
        names = [name for name, _ in self._named()]
        self.layer.update(tree_unflatten(list(zip(names, arrays, strict=True))))

    def _named(self) -> list[tuple[str, Any]]:
        return list(tree_flatten(self.layer.trainable_parameters()))


def checkpoint_layer(layer: Any, weights: LayerWeights) -> None:
    """Make one layer recompute its activations."""
    original: Callable[..., Any] = type(layer).__call__

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        bound = weights.get()

        def run(x: Any, *arrays: Any) -> Any:
            weights.set(arrays)
            return original(self, x, *args, **kwargs)

        x, *arrays = weights_first(x, *bound) if bound else (x,)
        result = mx.checkpoint(run)(x, *arrays)
        weights.set(bound)
        return result

    layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": call})

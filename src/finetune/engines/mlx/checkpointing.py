"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of kept.

`mx.checkpoint` differentiates explicit arguments only, so a layer's trained weights are handed to it as such. Each
layer object gets a class of its own: the model's classes, which other sessions share, stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from finetune.engines.mlx.lora import LoraSlot


class LayerWeights(Protocol):
    """The trained weights of one layer, as the call under way has bound them."""

    def get(self) -> Any:
        """A tree of arrays."""
        ...

    def set(self, arrays: Any) -> None:
        """Compute with other arrays from here on."""
        ...


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The adapters of one layer."""

    slot: LoraSlot
    modules: Sequence[str]

    def get(self) -> Any:
        updates = {module: self.slot.active[module] for module in self.modules}
        return {module: (update.a, update.b, update.magnitude) for module, update in updates.items()}

    def set(self, arrays: Any) -> None:
        active = dict(self.slot.active)
        for module, (a, b, magnitude) in arrays.items():
            active[module] = active[module]._replace(a=a, b=b, magnitude=magnitude)
        self.slot.active = active


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """Every weight of one layer."""

    layer: Any

    def get(self) -> Any:
        return self.layer.trainable_parameters()

    def set(self, arrays: Any) -> None:
        self.layer.update(arrays)


def checkpoint_layer(layer: Any, weights: LayerWeights) -> None:
    """Make one layer recompute its activations."""
    original: Callable[..., Any] = type(layer).__call__

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        bound = weights.get()

        def run(x: Any, arrays: Any) -> Any:
            weights.set(arrays)
            return original(self, x, *args, **kwargs)

        result = mx.checkpoint(run)(x, bound)
        weights.set(bound)
        return result

    layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": call})

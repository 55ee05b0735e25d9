"""Trained weights in float32, end to end in one buffer, with a second buffer for the sums of their gradients.

An optimizer that treats every element alike runs over the buffers, not over hundreds of small tensors. Gradients of
all micro-batches are added straight into the second buffer.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class Masters:
    """The weights by name, as views of `weights` [P]; `gradients` [P] has the same order.

    The weights that decay come first: `decaying` is the number of their elements.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], decays: Callable[[str], bool], device: torch.device
    ) -> None:
        self.shapes = {name: torch.Size(shapes[name]) for name in sorted(shapes, key=lambda name: not decays(name))}
        self.decaying = sum(shape.numel() for name, shape in self.shapes.items() if decays(name))
        total = sum(shape.numel() for shape in self.shapes.values())
        self.weights = torch.zeros(total, device=device)
        self.gradients = torch.zeros(total, device=device)
        self._decays = {name: decays(name) for name in self.shapes}

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """A buffer of P elements as tensors by name."""
        parts = torch.split(buffer, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a weight."""
        return self._decays[name]

    def named(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, weight, gradient) of each."""
        gradients = self.views(self.gradients)
        for name, weight in self.views(self.weights).items():
            yield name, weight, gradients[name]

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take other weights."""
        with torch.no_grad():
            for name, weight in self.views(self.weights).items():
                weight.copy_(values[name])

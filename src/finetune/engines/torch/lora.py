"""LoRA around the linear modules of a model (Hu et al. 2021): y = W x + scale B A dropout(x).

The layers hold no adapter of their own. They ask a `LoraSlot` what to add, and the slot is filled for each call:
with the weights being trained, with one of several named adapters, or with nothing, which is the base. Adapters are
float32, products are in the type of the activations.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from finetune.adapters.targets import LinearShape
from finetune.engines.torch.dora import RowScales, scale_rows
from finetune.engines.torch.frozen import FrozenWeight, frozen_weight, linear_widths


class LoraWeights(NamedTuple):
    """One module's update as the device holds it."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    magnitude: Tensor | None = None  # [out], of DoRA


class Mixed(Protocol):
    """Several adapters, of which each token of the call takes its own."""

    def product(self, layer: "LoRALinear", x: Tensor) -> Tensor:
        """What the layer makes of x [N, in]: [N, out]."""
        ...


@dataclass(slots=True)
class LoraSlot:
    """What the LoRA layers of one model add in the call under way."""

    active: Mapping[str, LoraWeights] = field(default_factory=dict)  # by module name
    mixed: Mixed | None = None  # goes before `active`
    dropout: float = 0.0
    seeds: Mapping[str, int] = field(default_factory=dict)  # of dropout, by module name; none: no dropout

    def draw_dropout(self, entropy: Iterable[int], modules: Iterable[str]) -> None:
        """Give each module its own seed, derived from one source."""
        names = list(modules)
        seeds = np.random.SeedSequence(list(entropy)).generate_state(len(names), np.uint64)
        self.seeds = {name: int(seed) for name, seed in zip(names, seeds, strict=True)}


class LoRALinear(nn.Module):
    """A linear module with whatever the slot holds for its name."""

    def __init__(self, base: nn.Module, path: str, slot: LoraSlot) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.slot = slot
        self.weight = frozen_weight(base)
        self.row_scales = RowScales(self.weight)  # of DoRA

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.slot.mixed is not None:
            y = self.slot.mixed.product(self, flat)
        elif update := self.slot.active.get(self.path):
            y = self._adapted(flat, update)
        else:
            y = self.base(flat)
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def bias(self) -> Tensor | None:
        """The base's, [out]."""
        base: Any = self.base
        bias: Tensor | None = base.bias
        return bias

    def _adapted(self, x: Tensor, update: LoraWeights) -> Tensor:
        if update.magnitude is None:
            return self._product(x, update, self.bias)
        y = self._product(x, update, None)
        scale = self.row_scales.of(update.a, update.b, update.scale, update.magnitude, x.dtype)
        return scale_rows(y, update.magnitude, scale, self.bias)

    def _product(self, x: Tensor, update: LoraWeights, bias: Tensor | None) -> Tensor:
        fixed = Fixed(self.weight, bias, update.scale, self._dropout_mask)
        y: Tensor = _LoraProduct.apply(x, update.a, update.b, fixed)  # type: ignore[no-untyped-call]
        return y

    @property
    def _dropout_mask(self) -> "DropoutMask | None":
        seed = self.slot.seeds.get(self.path)
        return None if seed is None or not self.slot.dropout else DropoutMask(self.slot.dropout, seed)


class DropoutMask(NamedTuple):
    """Zeroes a share of the elements and enlarges the rest: a function of the seed, so that it can be drawn again."""

    probability: float
    seed: int

    def applied(self, x: Tensor) -> Tensor:
        """x with the same elements zero on each call."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        keep = 1.0 - self.probability
        kept = torch.empty_like(x).bernoulli_(keep, generator=generator)
        return kept.mul_(x).div_(keep)


class Fixed(NamedTuple):
    """What a product with an adapter takes besides the tensors that get a gradient."""

    weight: FrozenWeight
    bias: Tensor | None
    scale: float
    mask: DropoutMask | None


class _LoraProduct(torch.autograd.Function):
    """W x + scale B A x' + bias; keeps x and A x', reads the frozen W again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, fixed: Fixed) -> Tensor:
        """x [N, in] -> [N, out]."""
        y = fixed.weight.product(x, fixed.bias)
        low = linear(x if fixed.mask is None else fixed.mask.applied(x), a.to(x.dtype))
        ctx.save_for_backward(x, low, a, b)
        ctx.fixed = fixed
        return y.addmm_(low, b.to(x.dtype).T, alpha=fixed.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        fixed: Fixed = ctx.fixed
        into_low = gradient @ (b * fixed.scale).to(gradient.dtype)
        dropped = x if fixed.mask is None else fixed.mask.applied(x)
        into_a = (into_low.T @ dropped).to(a.dtype)
        into_b = (low.T @ gradient).T.to(b.dtype).mul_(fixed.scale)  # faster than gradient.T @ low
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = gradient @ fixed.weight.dense(gradient.dtype)
            if fixed.mask is None:
                into_x.addmm_(into_low, a.to(gradient.dtype))
            else:
                into_x += fixed.mask.applied(into_low @ a.to(gradient.dtype))
        return into_x, into_a, into_b, None


def linear_paths(model: nn.Module, head_path: str = "") -> dict[str, LinearShape]:
    """Every linear module by its path, adapted or not, in the order of the layers.

    A head that shares the embedding's weight is none: an update of its own would untie the two.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    shapes = {}
    for path, module in model.named_modules():
        widths = linear_widths(module)
        if widths and id(getattr(module, "weight", None)) not in embeddings:
            name = path.removesuffix(".base")  # inside a LoRALinear
            shapes[name] = LinearShape(*widths, name == head_path)
    return shapes


def insert_lora(model: nn.Module, paths: Mapping[str, str], slot: LoraSlot) -> None:
    """Wrap the modules at `paths` (module path in the model -> adapter's name for it)."""
    for path, name in paths.items():
        model.set_submodule(path, LoRALinear(model.get_submodule(path), name, slot))

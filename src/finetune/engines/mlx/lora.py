"""LoRA around the linear modules of a model (Hu et al. 2021): y = W x + scale B A dropout(x).

With a magnitude m the rows of the result are scaled by m / n, which is DoRA: see `dora`.

The layers hold no adapter of their own. They ask a `LoraSlot` what to add, and the slot is filled for each call:
with the weights being trained (so that they are explicit arguments of the differentiated function), with one of
several named adapters, or with nothing, which is the base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from finetune.adapters.targets import LinearShape
from finetune.engines.mlx.dora import scale_rows
from finetune.engines.mlx.quantize import product


class LoraWeights(NamedTuple):
    """One module's update as the device holds it."""

    a: Any  # [rank, in]
    b: Any  # [out, rank]
    scale: float
    magnitude: Any | None = None  # [out], for DoRA
    norms: Any | None = None  # [out], beside a magnitude: lengths of the rows of W + scale B A, a constant

    def added(self, x: Any, y: Any) -> Any:
        """y [N, out] of the frozen weights with the update for x [N, in]."""
        low = (x @ self.a.T.astype(x.dtype)) * self.scale
        y = y + low @ self.b.T.astype(x.dtype)
        return y if self.magnitude is None else scale_rows(y, self.magnitude, self.norms)

    def trained(self) -> dict[str, Any]:
        """What gradients are taken of, by field."""
        arrays = {"a": self.a, "b": self.b, "magnitude": self.magnitude}
        return {name: array for name, array in arrays.items() if array is not None}


@dataclass(slots=True)
class LoraSlot:
    """What the LoRA layers of one model add in the call under way."""

    active: Mapping[str, Any] = field(default_factory=dict)  # by module: `LoraWeights`, or another with its `added`
    dropout: float = 0.0
    keys: Mapping[str, Any] = field(default_factory=dict)  # dropout's random key by module path; none: no dropout

    def draw_dropout(self, key: Any, modules: Iterable[str]) -> None:
        """Give each module its own key, derived from one."""
        names = list(modules)
        self.keys = dict(zip(names, mx.random.split(key, len(names)), strict=True))


class LoRALinear(nn.Module):  # type: ignore[misc]
    """A linear module with whatever the slot holds for its path."""

    def __init__(self, base: Any, path: str, slot: LoraSlot) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.slot = slot

    def __call__(self, x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])  # MLX would flatten and restore for each product
        y = product(self.base, rows)
        update = self.slot.active.get(self.path)
        if update is not None:
            y = update.added(self._dropped(rows), y)
        y = y + self.base.bias if "bias" in self.base else y
        return y.reshape(*x.shape[:-1], -1)

    def _dropped(self, x: Any) -> Any:
        key = self.slot.keys.get(self.path)
        if key is None:
            return x
        keep = 1.0 - self.slot.dropout
        return mx.where(mx.random.bernoulli(keep, x.shape, key=key), x / keep, 0.0).astype(x.dtype)


def linear_paths(model: Any, head_path: str = "") -> dict[str, LinearShape]:
    """Every plain or quantised linear module by its path, adapted or not, in the order of the layers."""
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            out_features, in_features = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                in_features = in_features * 32 // module.bits
            name = path.removesuffix(".base")  # inside a LoRALinear
            shapes[name] = LinearShape(in_features, out_features, name == head_path)
    return {path: shapes[path] for path in sorted(shapes, key=_natural)}


def _natural(path: str) -> list[tuple[bool, int | str]]:
    """Layer 10 comes after layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in path.split(".")]


def insert_lora(model: Any, paths: Mapping[str, str], slot: LoraSlot) -> dict[str, Any]:
    """Wrap the modules at `paths` (module path in the model -> adapter's name for it); what they were, by that name."""
    found = {path: module for path, module in model.named_modules() if path in paths}
    for path, module in found.items():
        _replace(model, path, LoRALinear(module, paths[path], slot))
    return {paths[path]: module for path, module in found.items()}


def _replace(model: Any, path: str, module: Any) -> None:
    *parents, name = path.split(".")
    owner = model
    for part in parents:
        owner = owner[int(part)] if part.isdigit() else owner[part]
    owner[name] = module

"""Puts adapters onto a base model: names and shapes checked, LoRA layers inserted, weights moved to the device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.adapters.adapter import Adapter, LoraUpdate
from finetune.adapters.fitting import read_fitting
from finetune.adapters.targets import LinearShape
from finetune.engines.mlx.dora import RowNorms
from finetune.engines.mlx.head import unsplit
from finetune.engines.mlx.layout import Layout
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.lora import LoraSlot, LoraWeights, insert_lora, linear_paths


@dataclass(frozen=True, slots=True)
class AdaptableModel:
    """A base whose linear modules can take adapters through `slot`."""

    base: BaseModel
    slot: LoraSlot
    layers: Mapping[str, Any]  # the frozen linear modules, by PEFT's names


def adapter_shapes(model: Any, layout: Layout, head: str = "") -> dict[str, LinearShape]:
    """Every linear module by the name that PEFT gives it; `head` is the path of the output projection."""
    return {layout.adapter_name(path): shape for path, shape in linear_paths(model, head).items()}


def make_adaptable(base: BaseModel, modules: set[str]) -> AdaptableModel:
    """Insert LoRA layers at `modules` (PEFT names), which add nothing until the slot is filled."""
    return adapt_more(AdaptableModel(base, LoraSlot(), {}), modules)


def adapt_more(adaptable: AdaptableModel, modules: set[str]) -> AdaptableModel:
    """Insert LoRA layers at those of `modules` that have none."""
    base, slot = adaptable.base, adaptable.slot
    names = {path: base.layout.adapter_name(path) for path in linear_paths(base.model)}
    new = modules - adaptable.layers.keys()
    paths = {path: name for path, name in names.items() if name in new}
    layers = insert_lora(base.model, paths, slot)
    if base.split.head.path in paths:  # the head is adapted: only the model itself computes its logits
        base = replace(base, split=unsplit(base.split, base.model))
    return AdaptableModel(base, slot, {**adaptable.layers, **layers})


def read_for(model: Any, layout: Layout, directory: Path) -> Adapter:
    """Read an adapter for this model, or raise ModelError with everything that does not fit."""
    return read_fitting(directory, adapter_shapes(model, layout))


def on_device(adapter: Adapter, norms: RowNorms) -> dict[str, LoraWeights]:
    """An adapter as the slot takes it; `norms` are of the modules that have a magnitude."""
    return {
        module: _on_device(module, update, adapter.config.scale(module, update.rank), norms)
        for module, update in adapter.updates.items()
    }


def _on_device(module: str, update: LoraUpdate, scale: float, norms: RowNorms) -> LoraWeights:
    a, b = mx.array(update.a), mx.array(update.b)
    if update.magnitude is None:
        return LoraWeights(a, b, scale)
    return LoraWeights(a, b, scale, mx.array(update.magnitude), norms.updated(module, a, b, scale))

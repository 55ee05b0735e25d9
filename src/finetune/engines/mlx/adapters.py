"""Puts adapters onto a base model: names and shapes checked, LoRA layers inserted, weights moved to the device."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.adapters.store import Adapter, read_adapter
from finetune.adapters.targets import LinearShape
from finetune.core.errors import ModelError
from finetune.engines.mlx.head import unsplit
from finetune.engines.mlx.layout import Layout
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.lora import LoraSlot, LoraWeights, insert_lora, linear_paths


@dataclass(frozen=True, slots=True)
class AdaptableModel:
    """A base whose linear modules can take adapters through `slot`."""

    base: BaseModel
    slot: LoraSlot


def adapter_shapes(model: Any, layout: Layout, head: str = "") -> dict[str, LinearShape]:
    """Every linear module by the name that PEFT gives it; `head` is the path of the output projection."""
    return {layout.adapter_name(path): shape for path, shape in linear_paths(model, head).items()}


def make_adaptable(base: BaseModel, modules: set[str]) -> AdaptableModel:
    """Insert LoRA layers at `modules` (PEFT names), which add nothing until the slot is filled."""
    names = {path: base.layout.adapter_name(path) for path in linear_paths(base.model)}
    paths = {path: name for path, name in names.items() if name in modules}
    slot = LoraSlot()
    insert_lora(base.model, paths, slot)
    if base.split.head.path in paths:  # the head is adapted: only the model itself computes its logits
        base = replace(base, split=unsplit(base.model))
    return AdaptableModel(base, slot)


def read_for(model: Any, layout: Layout, directory: Path) -> Adapter:
    """Read an adapter and give its modules PEFT's names.

    Raises ModelError with every module that the model lacks and every shape that does not fit it.
    """
    adapter = read_adapter(directory)
    shapes = adapter_shapes(model, layout)
    names = {path: layout.adapter_name(path) for path in linear_paths(model)}
    pairs = {names.get(module, module): pair for module, pair in adapter.pairs.items()}
    problems = []
    for module, pair in pairs.items():
        shape = shapes.get(module)
        if shape is None:
            problems.append(f"{module}: the model has no linear module of this name")
        elif (pair.a.shape[1], pair.b.shape[0]) != (shape.in_features, shape.out_features):
            problems.append(
                f"{module}: adapter {pair.a.shape[1]} -> {pair.b.shape[0]}, "
                f"model {shape.in_features} -> {shape.out_features}"
            )
    if problems:
        raise ModelError("\n  ".join([f"The adapter {directory} does not fit the model:", *problems]))
    return Adapter(adapter.config, pairs)


def on_device(adapter: Adapter) -> dict[str, LoraWeights]:
    """An adapter as the slot takes it."""
    return {
        module: LoraWeights(mx.array(pair.a), mx.array(pair.b), adapter.config.scale(module, int(pair.a.shape[0])))
        for module, pair in adapter.pairs.items()
    }

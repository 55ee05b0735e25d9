"""Puts adapters onto a base model: names and shapes checked, LoRA layers inserted, weights moved to the device."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from finetune.adapters.adapter import Adapter
from finetune.adapters.fitting import read_fitting
from finetune.engines.torch.head import unsplit
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.lora import LoRALinear, LoraSlot, LoraWeights, insert_lora, linear_paths


@dataclass(frozen=True, slots=True)
class AdaptableModel:
    """A base whose linear modules can take adapters through `slot`."""

    base: BaseModel
    slot: LoraSlot


def make_adaptable(base: BaseModel, modules: set[str]) -> AdaptableModel:
    """Insert LoRA layers at `modules`, which add nothing until the slot is filled."""
    return adapt_more(AdaptableModel(base, LoraSlot()), modules)


def adapt_more(adaptable: AdaptableModel, modules: set[str]) -> AdaptableModel:
    """Insert LoRA layers at those of `modules` that have none."""
    base, slot = adaptable.base, adaptable.slot
    adapted = {path for path, module in base.model.named_modules() if isinstance(module, LoRALinear)}
    paths = {path: path for path in linear_paths(base.model) if path in modules - adapted}
    insert_lora(base.model, paths, slot)
    if base.split.head.path in paths:  # the head is adapted: only the model itself computes its logits
        base = replace(base, split=unsplit(base.model))
    return AdaptableModel(base, slot)


def read_for(model: nn.Module, directory: Path) -> Adapter:
    """Read an adapter for this model, or raise ModelError with everything that does not fit."""
    return read_fitting(directory, linear_paths(model))


def on_device(adapter: Adapter, device: torch.device) -> dict[str, LoraWeights]:
    """An adapter as the slot takes it."""
    return {
        module: LoraWeights(
            torch.from_numpy(update.a).to(device),
            torch.from_numpy(update.b).to(device),
            adapter.config.scale(module, update.rank),
            None if update.magnitude is None else torch.from_numpy(update.magnitude).to(device),
        )
        for module, update in adapter.updates.items()
    }

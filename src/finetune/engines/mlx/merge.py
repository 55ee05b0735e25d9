"""Merges an adapter into its base, file by file: W + scale B A in float32, rounded once to the type of W."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.adapters.adapter import Adapter
from finetune.core.errors import ModelError, UsageError
from finetune.core.types import MergeReport
from finetune.engines.mlx.adapters import read_for
from finetune.engines.mlx.layout import Layout
from finetune.engines.mlx.loading import is_quantized, open_unread, weight_files
from finetune.engines.mlx.saving import copy_companions, save_shard

_INDEX = "model.safetensors.index.json"


def merge_adapter(base: Path, *, adapter: Path, destination: Path) -> MergeReport:
    """Write a whole model directory at `destination`, which must be new or empty, and appears only when it is whole.

    Raises ModelError where adapter and base do not fit, or the base is quantised.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} exists already. Choose a new or empty directory.")
    model, layout = open_unread(base)
    if is_quantized(model):
        raise ModelError(
            f"{base} is quantised: rounding to its few bits would erase most of the adapter. Merge into the original "
            "model, or keep base and adapter apart (`ft generate --model ... --adapter ...`)."
        )
    read = read_for(model, layout, adapter)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        report = _merge_files(base, read, layout, partial)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _merge_files(base: Path, adapter: Adapter, layout: Layout, directory: Path) -> MergeReport:
    copy_companions(base, directory)
    for name in ("config.json", _INDEX):
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    merged, largest = 0, 0.0
    for file in weight_files(base):
        tensors: Any = mx.load(str(file))
        for module, names in _modules_of(adapter, layout, tensors).items():
            tensors[names], change = _merged(tensors[names], adapter, module, layout)
            merged, largest = merged + 1, max(largest, change)
        save_shard(directory / file.name, tensors)
    if merged != len(adapter.updates):
        raise ModelError(
            f"Only {merged} of {len(adapter.updates)} adapted modules have a tensor of their own in {base}: "
            "this architecture cannot be merged. Keep base and adapter apart."
        )
    return MergeReport(merged, largest)


def _modules_of(adapter: Adapter, layout: Layout, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Adapted module -> its tensor in this file."""
    found = {}
    for module in adapter.updates:
        for name in (f"{module}.weight", layout.short_name(f"{module}.weight")):
            if name in tensors:
                found[module] = name
    return found


def _merged(weight: Any, adapter: Adapter, module: str, layout: Layout) -> tuple[Any, float]:
    pair = adapter.updates[module]
    scale = adapter.config.scale(module, int(pair.a.shape[0]))
    delta = (mx.array(pair.b) @ mx.array(pair.a)) * scale
    before = weight.astype(mx.float32)
    after = (before + (delta.T if layout.transposes else delta)).astype(weight.dtype)
    change: Any = mx.abs(after.astype(mx.float32) - before).max()
    mx.eval(after, change)
    return after, float(change.item())

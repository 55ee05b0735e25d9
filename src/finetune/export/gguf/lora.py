"""A LoRA adapter as GGUF, which llama.cpp adds to a base of the same model (`--lora FILE`)."""

from pathlib import Path

import numpy as np

from finetune.adapters.adapter import Adapter
from finetune.core.errors import ModelError
from finetune.core.types import FloatArray
from finetune.export.gguf.architectures import Shape
from finetune.export.gguf.tensors import Names, Tensor, constant, in_layout
from finetune.export.gguf.writer import write_tensors


def write_lora(file: Path, adapter: Adapter, shape: Shape, *, name: str) -> None:
    """Write A and B in float32, B's rows in the order of llama.cpp's weights.

    llama.cpp multiplies by alpha / rank with one alpha for all: a module of another scale has the ratio in its B.
    Raises ModelError for DoRA, and for modules that llama.cpp lacks.
    """
    from gguf import GGUFWriter

    tensors, alpha = lora_tensors(adapter, shape)
    writer = GGUFWriter(file, shape.architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(name)
    write_tensors(writer, tensors, ["F32"] * len(tensors))


def lora_tensors(adapter: Adapter, shape: Shape) -> tuple[list[Tensor], float]:
    """The tensors by llama.cpp's names, and the alpha of all."""
    _require_plain(adapter)
    placed = _placed(adapter, shape)
    scales = {module: adapter.scale(module) * adapter.updates[module].rank for module in placed}
    alpha = next(iter(scales.values()))
    tensors = []
    for module, name in placed.items():
        update = adapter.updates[module]
        b = in_layout(name, update.b, shape)
        if scales[module] != alpha:
            b = b * np.float32(scales[module] / alpha)
        tensors += [_tensor(f"{name}.lora_a", update.a), _tensor(f"{name}.lora_b", b)]
    return tensors, alpha


def _tensor(name: str, values: FloatArray) -> Tensor:
    return Tensor(name, values.shape, constant(values))


def _require_plain(adapter: Adapter) -> None:
    scaled = [module for module, update in adapter.updates.items() if update.magnitude is not None]
    if scaled:
        raise ModelError(
            f"This adapter is DoRA ({len(scaled)} modules with a magnitude), and GGUF's adapters hold plain LoRA. "
            "Merge it into the model: --format gguf."
        )


def _placed(adapter: Adapter, shape: Shape) -> dict[str, str]:
    """llama.cpp's name of each module's weight."""
    names = Names(shape)
    found = {module: names.of_module(module) for module in adapter.updates}
    lost = [module for module, name in found.items() if name is None or not name.startswith(("blk.", "output."))]
    if lost:
        title = f"llama.cpp adds no LoRA to these modules of {shape.architecture.name}:"
        raise ModelError("\n  ".join([title, *lost]) + "\nMerge the adapter into the model: --format gguf.")
    return {module: name for module, name in found.items() if name is not None}

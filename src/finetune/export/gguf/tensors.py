"""The tensors of a model under llama.cpp's names and in its layout, read one at a time, with an adapter merged in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.adapter import Adapter, LoraUpdate
from finetune.adapters.tensors import as_float32
from finetune.core.errors import ModelError
from finetune.core.types import FloatArray
from finetune.engines.merging import merged_weight
from finetune.export.gguf.architectures import Shape
from finetune.export.gguf.metadata import rope_tensors
from finetune.models.weights import TensorInfo, read_model_weights

_PARTS = (".weight", ".bias")
_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the GGUF file. `read` gives its values as float32, in `shape`, rows first."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], FloatArray]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """All tensors of a model, in the order in which they are written."""

    tensors: tuple[Tensor, ...]
    vocabulary: int  # rows of the embedding
    notices: tuple[str, ...] = ()


class Names:
    """llama.cpp's names for the tensors and modules of one model, whichever library called them."""

    def __init__(self, shape: Shape) -> None:
        import gguf

        architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(architectures[shape.architecture.name], shape.layers)
        self._starts = "transformer." if shape.architecture.name == "gpt2" else None

    def of_tensor(self, name: str) -> str | None:
        """The name with `.weight` or `.bias`; None where llama.cpp has no such tensor."""
        found = self._map.get_name(self._plain(name), try_suffixes=_PARTS)
        return None if found is None else str(found)

    def of_module(self, module: str) -> str | None:
        """The name of a linear module's weight; None where llama.cpp has no such module."""
        return self.of_tensor(f"{module}.weight")

    def _plain(self, name: str) -> str:
        for prefix, plain in _PREFIXES:
            if name.startswith(prefix):
                return plain + name.removeprefix(prefix)
        if self._starts is not None and not name.startswith((self._starts, "lm_head.")):
            return self._starts + name.removeprefix("model.")
        return name


def plan_tensors(model: Path, shape: Shape, adapter: Adapter | None = None) -> TensorPlan:
    """What is written for a model directory of floating point weights, with `adapter` added to them in float32.

    Raises ModelError naming every tensor and module that llama.cpp lacks or that does not fit.
    """
    names = Names(shape)
    stored: dict[str, TensorInfo] = {}
    notices, unknown = [], []
    images = 0
    for tensor in read_model_weights(model):
        name = names.of_tensor(tensor.name)
        if tensor.name.startswith(_IMAGES):
            images += 1
        elif name is not None:
            stored[name] = tensor
        elif not tensor.name.endswith(_BUFFERS):
            unknown.append(f"{tensor.name}: llama.cpp's {shape.architecture.name} has no such tensor")
    if shape.tied:
        stored.pop("output.weight", None)
    if images:
        notices.append(f"{images} tensors that read images were left out: the file holds the language model.")
    updates = {} if adapter is None else _placed(adapter, names, stored, shape, unknown)
    unknown += [f"{t.name} is stored as {t.dtype}" for t in stored.values() if t.dtype not in _FLOATS]
    if unknown:
        raise ModelError("\n  ".join([f"{model} cannot be written as GGUF:", *unknown]))
    extra = [Tensor(name, array.shape, constant(array)) for name, array in rope_tensors(shape).items()]
    tensors = [_tensor(name, info, shape, updates.get(name)) for name, info in sorted(stored.items(), key=_order)]
    return TensorPlan((*extra, *tensors), stored["token_embd.weight"].shape[0], tuple(notices))


def _placed(
    adapter: Adapter, names: Names, stored: Mapping[str, TensorInfo], shape: Shape, problems: list[str]
) -> dict[str, tuple[LoraUpdate, float]]:
    """The update of each tensor, with its scale. What has no place is added to `problems`."""
    placed = {}
    for module, update in adapter.updates.items():
        name = names.of_module(module)
        if name is None or name not in stored:
            problems.append(f"{module}: the adapter changes it, and the base has no weight of its own there")
            continue
        size = stored[name].shape[::-1] if shape.architecture.transposes else stored[name].shape
        if (update.b.shape[0], update.a.shape[1]) != size:
            problems.append(
                f"{module}: the adapter is for {update.b.shape[0]} x {update.a.shape[1]}, the base has "
                f"{' x '.join(map(str, size))}; is it another base's?"
            )
        placed[name] = (update, adapter.scale(module))
    return placed


def _tensor(name: str, info: TensorInfo, shape: Shape, update: tuple[LoraUpdate, float] | None) -> Tensor:
    flips = shape.architecture.transposes and name.startswith("blk.") and len(info.shape) == 2

    def read() -> FloatArray:
        values = read_values(info)
        values = np.ascontiguousarray(values.T) if flips else values
        values = values if update is None else merged_weight(values, *update)
        return in_layout(name, values, shape)

    return Tensor(name, info.shape[::-1] if flips else info.shape, read)


def in_layout(name: str, values: FloatArray, shape: Shape) -> FloatArray:
    """A tensor's values [out, ...] in llama.cpp's order, and norms with what the architecture adds to them."""
    architecture = shape.architecture
    if architecture.norm_offset and name.endswith("norm.weight"):
        return values + np.float32(architecture.norm_offset)
    kind = name.split(".")[2] if name.startswith("blk.") else ""
    if architecture.permutes and kind in {"attn_q", "attn_k"}:
        return permuted(values, shape.heads if kind == "attn_q" else shape.kv_heads)
    return values


def permuted(rows: FloatArray, heads: int) -> FloatArray:
    """Rows [out, ...] with the halves of each head's rotations interleaved: (a0, a1, b0, b1) -> (a0, b0, a1, b1)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def read_values(tensor: TensorInfo) -> FloatArray:
    """A stored tensor as float32."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return as_float32(file.read(tensor.bytes), tensor.dtype, tensor.shape)


def constant(array: FloatArray) -> Callable[[], FloatArray]:
    """A reader of values that are in memory."""
    return lambda: array


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    """The embedding first, then layer by layer, the head last."""
    parts = item[0].split(".")
    if parts[0] == "blk":
        return int(parts[1]), item[0]
    return (-1 if "embd" in parts[0] else 1 << 30), item[0]

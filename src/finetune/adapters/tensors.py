"""Reads safetensors files into float32 NumPy arrays, bfloat16 included, which NumPy has no type for."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

from finetune.core.errors import ModelError
from finetune.core.types import FloatArray

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensors(path: Path) -> dict[str, FloatArray]:
    """Every tensor of the file as float32. Raises ModelError where it is missing or damaged."""
    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}. Copy the adapter again.") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the file again.") from None
    unknown = sorted({entry["dtype"] for _, entry in entries} - _TYPES.keys())
    if unknown:
        raise ModelError(f"{path} holds tensors of type {', '.join(unknown)}. Adapters are of floating point types.")
    return {name: _as_float32(entry["data"], entry["dtype"], entry["shape"]) for name, entry in entries}


def _as_float32(data: bytes, dtype: str, shape: list[int]) -> FloatArray:
    raw = np.frombuffer(data, dtype=_TYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32).reshape(shape)

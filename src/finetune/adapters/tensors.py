"""Reads safetensors and NumPy files into float32 arrays, bfloat16 included, which NumPy has no type for."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from finetune.core.errors import ModelError
from finetune.core.types import FloatArray

NPZ = ".npz"
_OPAQUE = np.dtype("V2")  # what MLX saves bfloat16 as, for which NumPy has no name
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensors(path: Path) -> dict[str, FloatArray]:
    """Every tensor of a .safetensors or .npz file as float32. Raises ModelError where it is missing or damaged."""
    try:
        return _read_npz(path) if path.suffix == NPZ else _read_safetensors(path)
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}. Copy the adapter again.") from None
    except (OSError, SafetensorError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the file again.") from None


def _read_safetensors(path: Path) -> dict[str, FloatArray]:
    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    _refuse_types(path, {entry["dtype"] for _, entry in entries} - _TYPES.keys())
    return {name: as_float32(entry["data"], entry["dtype"], entry["shape"]) for name, entry in entries}


def tensor_names(path: Path) -> set[str]:
    """The names in a .safetensors file, without its tensors."""
    with safe_open(path, "np") as file:
        return set(file.keys())


def as_float32(data: bytes, dtype: str, shape: Sequence[int]) -> FloatArray:
    """The bytes of a tensor of safetensors' type F64, F32, F16 or BF16 as float32."""
    raw = np.frombuffer(data, dtype=_TYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32).reshape(shape)


def _read_npz(path: Path) -> dict[str, FloatArray]:
    """Without pickled objects, which could run a program."""
    with path.open("rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is not a NumPy archive")
        arrays = {name: file[name] for name in file.files}
    known = [array.dtype.kind == "f" or array.dtype == _OPAQUE for array in arrays.values()]
    _refuse_types(path, {str(array.dtype) for array, fits in zip(arrays.values(), known, strict=True) if not fits})
    return {name: _from_numpy(array) for name, array in arrays.items()}


def _from_numpy(array: Any) -> FloatArray:
    if array.dtype == _OPAQUE:
        return as_float32(array.tobytes(), "BF16", list(array.shape))
    return np.asarray(array, np.float32)


def _refuse_types(path: Path, unknown: set[str]) -> None:
    if unknown:
        raise ModelError(
            f"{path} holds tensors of type {', '.join(sorted(unknown))}. Adapters are of floating point types."
        )

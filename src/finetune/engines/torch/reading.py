"""Reads one tensor of a safetensors file straight into memory of its own: no mapped file, no second copy."""

from collections import Counter
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.errors import ModelError
from finetune.models.weights import TensorInfo, read_header

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PACKED_TYPES = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32, "BF16": torch.bfloat16}


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor on the CPU, as it is stored. Raises ModelError for a type that is no float, or a torn file."""
    dtype = _TYPES.get(info.dtype)
    if dtype is None:
        raise ModelError(
            f"{info.file}: {info.name} is of type {info.dtype}, and weights are of floating point types. "
            "Choose a model that is not quantised."
        )
    try:
        with info.file.open("rb", buffering=0) as stream:
            return _read_from(stream, info, dtype)
    except OSError as error:
        raise ModelError(f"{info.file} cannot be read: {error}. Copy the file again.") from None


def read_packed(file: Path) -> dict[str, Tensor]:
    """All tensors of a file of packed weights. It may be deleted meanwhile. Raises OSError and ModelError."""
    with file.open("rb", buffering=0) as stream:
        return {info.name: _read_from(stream, info, _PACKED_TYPES[info.dtype]) for info in read_header(file)}


def _read_from(stream: FileIO, info: TensorInfo, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(info.shape, dtype=dtype)
    target = tensor.reshape(-1).view(torch.uint8).numpy().data
    stream.seek(info.start)
    while target:
        count = stream.readinto(target)
        if not count:
            raise ModelError(f"{info.file} ends within {info.name}. Copy the file again.")
        target = target[count:]
    return tensor


def floating_type(tensors: Sequence[TensorInfo]) -> torch.dtype:
    """The floating point type of most of the tensors."""
    counts = Counter(tensor.dtype for tensor in tensors if tensor.dtype in _TYPES)
    return _TYPES[counts.most_common(1)[0][0]] if counts else torch.float32

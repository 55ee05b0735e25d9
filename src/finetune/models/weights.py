"""What is in a model's safetensors files, read from their headers alone: names, shapes, types, sizes.

A safetensors file is 8 bytes (little-endian length N), N bytes of JSON (name -> dtype, shape, data_offsets) and
the data. Reading headers takes milliseconds for a model of any size and runs nothing.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import ModelError
from finetune.core.files import read_json

INDEX = "model.safetensors.index.json"
# A quarter of the format's own limit, and several times what the largest models have: what is in a header takes
# many times its length in memory.
MAX_HEADER_BYTES = 25_000_000
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
}
BITS |= {
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `dtype` is safetensors' name (F32, BF16, U32, ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int  # of its data, in bytes from the beginning of the file

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8


def read_header(file: Path) -> tuple[TensorInfo, ...]:
    """The tensors of one file, by name.

    Raises ModelError where the file is not safetensors, is cut short, or declares what its size cannot hold.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(_damaged(file, f"its header claims {length:,} bytes of a file of {size:,}"))
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(_damaged(file, "its header is not JSON")) from error
    if not isinstance(header, dict):
        raise ModelError(_damaged(file, "its header is not a JSON object"))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = tuple(_tensor(file, name, entry, 8 + length, size) for name, entry in sorted(entries.items()))
    _require_cover(file, tensors, 8 + length, size)
    return tensors


def _require_cover(file: Path, tensors: Sequence[TensorInfo], data: int, size: int) -> None:
    """The tensors lie end to end, from `data` to the end of the file, as the format asks."""
    end = data
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes)):
        if tensor.start != end:
            how = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise ModelError(_damaged(file, f"{tensor.name} {how}"))
        end += tensor.bytes
    if end != size:
        raise ModelError(
            _damaged(file, f"its header describes {end - data:,} bytes of data, but {size - data:,} follow")
        )


def _tensor(file: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    """`data` is where the file's data begins, `size` where it ends."""
    try:
        begin, end = entry["data_offsets"]
        shape = tuple(int(length) for length in entry["shape"])
        tensor = TensorInfo(name, shape, str(entry["dtype"]), file, data + begin)
        fits = 0 <= begin <= end <= size - data and end - begin == tensor.bytes and min(tensor.shape, default=0) >= 0
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(_damaged(file, f"the entry of {name} is not complete or of an unknown type")) from error
    if not fits:
        raise ModelError(
            _damaged(file, f"{name} {list(tensor.shape)} {tensor.dtype} does not fit its place in the file")
        )
    return tensor


def _damaged(file: Path, how: str) -> str:
    return f"{file} is not a whole safetensors file: {how}. Copy or download it again."


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold a model's weights: those of its index, else `model*.safetensors`.

    Raises ModelError naming every missing shard.
    """
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        _require_shards(directory, names, f"its index {INDEX} names")
        return tuple(directory / name for name in names)
    files = tuple(sorted(directory.glob("model*.safetensors")))
    _require_shards(directory, _numbered(files), "the numbering asks for")
    return files


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = read_json(index)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} has no readable weight_map. Copy or download it again.") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in found.values()
    ):
        raise ModelError(f"{index} must map names of tensors to names of files beside it. Copy or download it again.")
    return found


def _numbered(files: Sequence[Path]) -> list[str]:
    """All names of a numbered set (`model-00001-of-00003.safetensors`) of which at least one file is there."""
    names: list[str] = []
    for file in files:
        match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", file.name)
        if match and not names:
            stem, _, count = match.groups()
            names = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, min(int(count), 1000) + 1)]
    return names


def _require_shards(directory: Path, names: Sequence[str], who: str) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        listed = ", ".join(missing)
        raise ModelError(
            f"{directory}: {len(missing)} of the {len(names)} weight files that {who} are missing: {listed}. "
            "Copy or download them."
        )


def read_weights(directory: Path) -> tuple[TensorInfo, ...]:
    """All tensors of a model directory.

    Raises ModelError for missing shards, damaged files, and an index that disagrees with its files.
    """
    tensors = tuple(tensor for file in weight_files(directory) for tensor in read_header(file))
    _require_unique(directory, tensors)
    if (directory / INDEX).is_file():
        _require_index(directory, tensors)
    return tensors


def _require_unique(directory: Path, tensors: Sequence[TensorInfo]) -> None:
    files: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in files:
            first, second = files[tensor.name], tensor.file.name
            raise ModelError(f"{directory}: {tensor.name} is in {first} and in {second}. Download the model again.")
        files[tensor.name] = tensor.file.name


def read_model_weights(directory: Path) -> tuple[TensorInfo, ...]:
    """`read_weights` of a model that is to be loaded: a directory without any is refused."""
    tensors = read_weights(directory)
    if not tensors:
        raise ModelError(f"{directory} holds no model*.safetensors weights. Copy the model again, or choose another.")
    return tensors


def _require_index(directory: Path, tensors: Sequence[TensorInfo]) -> None:
    stored = {tensor.name: tensor.file.name for tensor in tensors}
    weight_map = _weight_map(directory / INDEX)
    wrong = [f"{name} (expected in {file})" for name, file in sorted(weight_map.items()) if stored.get(name) != file]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ModelError(
            f"{directory}: tensors of the index {INDEX} are not in their files: {shown}. Download the model again."
        )

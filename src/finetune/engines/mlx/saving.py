"""Writes a whole model directory that transformers and mlx-lm load: weights, config, tokenizer, templates."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

_SHARD_BYTES = 5 * 10**9
_CARRIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")
_INDEX = "model.safetensors.index.json"
_NOT_CARRIED = {"config.json", _INDEX, "adapter_config.json"}
_TYPE_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def write_model(directory: Path, base: Path, tensors: Mapping[str, Any]) -> None:
    """Write `tensors` (by their file names) with everything else that the directory `base` holds beside its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    copy_companions(base, directory)
    types = [array.dtype for array in tensors.values() if mx.issubdtype(array.dtype, mx.floating)]
    _write_config(directory, base, _TYPE_NAMES.get(max(set(types), key=types.count)))
    shards = list(_shards(tensors))
    if len(shards) == 1:
        save_shard(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_shard(directory / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_shard(path: Path, tensors: Mapping[str, Any]) -> None:
    """One safetensors file, marked as transformers wants it."""
    mx.save_safetensors(str(path), dict(sorted(tensors.items())), metadata={"format": "pt"})


def copy_companions(base: Path, directory: Path) -> None:
    """Copy tokenizer, templates, generation config and licence; weights and config.json are left to the caller."""
    for pattern in _CARRIED:
        for file in sorted(base.glob(pattern)):
            if file.is_file() and file.name not in _NOT_CARRIED:
                shutil.copyfile(file, directory / file.name)


def _write_config(directory: Path, base: Path, dtype: str | None) -> None:
    """The base's config.json with the type of the new weights."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    size = 0
    for name, array in tensors.items():
        if shard and size + array.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard

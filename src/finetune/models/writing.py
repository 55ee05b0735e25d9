"""Writes a whole model directory around the weights that an engine has: config, tokenizer, templates, shards."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from finetune.models.older_names import with_older_names
from finetune.models.weights import INDEX

_SHARD_BYTES = 5 * 10**9
_CARRIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")
_NOT_CARRIED = {"config.json", INDEX, "adapter_config.json"}


class Sized(Protocol):
    """An array of any library."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        ...


Array = TypeVar("Array", bound=Sized)


def write_model_files(
    directory: Path,
    base: Path,
    tensors: Mapping[str, Array],
    *,
    dtype: str | None,
    save: Callable[[Path, Mapping[str, Array]], None],
) -> None:
    """Write `tensors` (by their file names) with everything else that the directory `base` holds beside its weights.

    `save` writes one safetensors file; `dtype` is what config.json shall say of the weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    copy_companions(base, directory)
    _write_config(directory, base, dtype)
    shards = list(_shards(tensors))
    if len(shards) == 1:
        save(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save(directory / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(base: Path, directory: Path) -> None:
    """Copy tokenizer, templates, generation config and licence; weights and config.json are left to the caller."""
    for pattern in _CARRIED:
        for file in sorted(base.glob(pattern)):
            if file.is_file() and file.name not in _NOT_CARRIED:
                shutil.copyfile(file, directory / file.name)


def _write_config(directory: Path, base: Path, dtype: str | None) -> None:
    """The base's config.json with the type of the new weights, readable for libraries that know older names."""
    config = with_older_names(json.loads((base / "config.json").read_text(encoding="utf-8")))
    if dtype is not None:
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    shard: dict[str, Array] = {}
    size = 0
    for name, array in tensors.items():
        if shard and size + array.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard

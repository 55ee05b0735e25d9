"""Writes a whole model directory that transformers and mlx-lm load."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.models.writing import write_model_files

_TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def write_model(directory: Path, base: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `tensors` (by their file names) as `dtype`, with what the directory `base` holds beside its weights."""

    def save(path: Path, shard: Mapping[str, Tensor]) -> None:
        save_shard(path, {name: tensor.to("cpu", dtype, copy=True) for name, tensor in shard.items()})

    write_model_files(directory, base, tensors, dtype=_TYPE_NAMES[dtype], save=save)


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, marked as transformers wants it."""
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})

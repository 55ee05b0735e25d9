"""Writes a whole model directory that transformers and mlx-lm load: weights, config, tokenizer, templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.models.writing import write_model_files

TYPE_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def write_model(directory: Path, base: Path, tensors: Mapping[str, Any]) -> None:
    """Write `tensors` (by their file names) with everything else that the directory `base` holds beside its weights."""
    types = [array.dtype for array in tensors.values() if mx.issubdtype(array.dtype, mx.floating)]
    dtype = TYPE_NAMES.get(max(set(types), key=types.count))
    write_model_files(directory, base, tensors, dtype=dtype, save=save_shard)


def save_shard(path: Path, tensors: Mapping[str, Any]) -> None:
    """One safetensors file, marked as transformers wants it."""
    mx.save_safetensors(str(path), dict(sorted(tensors.items())), metadata={"format": "pt"})

"""Writes a copy of a model with packed weights, in mlx-lm's layout, reading and packing one tensor after the other."""

from pathlib import Path

import mlx.core as mx
from mlx import nn

from finetune.core.errors import ModelError
from finetune.engines.mlx import compat
from finetune.engines.mlx.layout import without_prefix
from finetune.engines.mlx.loading import read_files
from finetune.models.writing import copy_companions

_GROUPS = (64, 32)  # mlx-lm's own size, and the next where it divides no row


def write_packed(model: Path, *, bits: int, destination: Path) -> None:
    """Fill `destination` with the floating point model of a directory, in `bits` a weight.

    mlx-lm packs embeddings and the head, too. Raises ModelError where no group size divides the rows.
    """
    config = compat.read_config(model)
    built = compat.build_model(config)
    files = without_prefix(str(config["model_type"]), read_files(model))
    built.load_weights(list(compat.sanitize(built, dict(files)).items()))
    group = next((size for size in _GROUPS if _divides(built, size)), None)
    if group is None:
        raise ModelError(f"{model} cannot be quantised: neither 64 nor 32 divides its rows. Export it without.")
    destination.mkdir(parents=True, exist_ok=True)
    copy_companions(model, destination)
    compat.save_packed(built, config, bits=bits, group=group, destination=destination)
    mx.clear_cache()


def _divides(model: nn.Module, group: int) -> bool:
    return any(
        module.weight.shape[-1] % group == 0 for _, module in model.named_modules() if hasattr(module, "to_quantized")
    )

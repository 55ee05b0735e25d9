"""Quantises a model directory as mlx-community does, with mlx-lm's own conversion."""

from pathlib import Path

from mlx_lm.convert import convert


def quantise(model: Path, destination: Path, *, bits: int = 4) -> Path:
    """Write the model in groups of 32 values."""
    convert(str(model), mlx_path=str(destination), quantize=True, q_bits=bits, q_group_size=32)
    return destination

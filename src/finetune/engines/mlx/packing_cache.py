"""Packed matrices of a base that is quantised on loading, kept between runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.engines.mlx.compat import versions
from finetune.engines.mlx.quantize import quantize_weights
from finetune.engines.packed_weights import read_or_pack
from finetune.models.conversions import Conversion, conversion_of

_PARTS = ("weight", "scales", "biases")


def pack_weights(weights: dict[str, Any], groups: Mapping[str, int], bits: int, path: Path) -> tuple[str, ...]:
    """`quantize_weights`, by reading what an earlier run made of the same files where that is there, bit for bit.

    Returns what a person should know.
    """
    names = [f"{module}.{part}" for module in groups for part in _PARTS]

    def read(file: Path) -> None:
        try:
            arrays: Any = mx.load(str(file))
        except RuntimeError as error:  # all that MLX raises where a file is gone
            raise OSError(str(error)) from None
        weights.update({name: arrays[name] for name in names})

    return read_or_pack(
        _conversion(weights, groups, bits, path),
        read=read,
        pack=lambda: quantize_weights(weights, groups, bits),
        packed=lambda: {name: weights[name] for name in names},
        write=lambda file, arrays: mx.save_safetensors(str(file), dict(arrays)),
    )


def _conversion(weights: Mapping[str, Any], groups: Mapping[str, int], bits: int, path: Path) -> Conversion | None:
    matrices = [weights[f"{module}.weight"] for module in groups]
    facts = {
        "bits": bits,
        "groups": dict(groups),
        "types": sorted({str(matrix.dtype) for matrix in matrices}),
        "device": str(mx.default_device().type),
        "mlx": versions(),
    }
    return conversion_of(path, facts, sum(matrix.nbytes for matrix in matrices))

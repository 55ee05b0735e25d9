"""Packed matrices of a base that is quantised on loading, kept between runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.engines.mlx.compat import versions
from finetune.engines.mlx.quantize import quantize_weights
from finetune.models.conversions import Conversion, conversion_of

_FILE = "packed.safetensors"
_PARTS = ("weight", "scales", "biases")


def pack_weights(weights: dict[str, Any], groups: Mapping[str, int], bits: int, path: Path) -> tuple[str, ...]:
    """`quantize_weights`, by reading what an earlier run made of the same files where that is there, bit for bit.

    Returns what a person should know.
    """
    notices: list[str] = []
    conversion = _conversion(weights, groups, bits, path)
    if conversion is None or not _read(weights, groups, conversion, notices.append):
        quantize_weights(weights, groups, bits)
        if conversion is not None:
            _keep(weights, groups, conversion, notices.append)
    return tuple(notices)


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


def _read(
    weights: dict[str, Any], groups: Mapping[str, int], conversion: Conversion, say: Callable[[str], None]
) -> bool:
    found = conversion.find(say)
    if found is None:
        return False
    packed: Any = mx.load(str(found / _FILE))
    for module in groups:
        weights.update({f"{module}.{part}": packed[f"{module}.{part}"] for part in _PARTS})
    say(f"The quantised weights are those that an earlier run made ({found}).")
    return True


def _keep(
    weights: Mapping[str, Any], groups: Mapping[str, int], conversion: Conversion, say: Callable[[str], None]
) -> None:
    packed = {f"{module}.{part}": weights[f"{module}.{part}"] for module in groups for part in _PARTS}
    size = sum(array.nbytes for array in packed.values())
    conversion.keep(size, lambda directory: mx.save_safetensors(str(directory / _FILE), packed), say)

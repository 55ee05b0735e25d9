"""Packed matrices of a base that is quantised on loading, kept between runs."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.engines.packed_weights import read_or_pack
from finetune.engines.torch.compat import versions
from finetune.engines.torch.quantize import Quantization, QuantizedLinear
from finetune.engines.torch.reading import read_packed, read_tensor
from finetune.models.conversions import Conversion, conversion_of
from finetune.models.weights import TensorInfo


def pack_weights(
    model: nn.Module, places: Mapping[str, TensorInfo], quantization: Quantization, path: Path, device: torch.device
) -> tuple[str, ...]:
    """Give the quantised modules their values: from `places` in the model's files, or those that an earlier run packed.

    Both are the same, bit for bit. Returns what a person should know.
    """
    modules = dict(quantized_modules(model))

    def read(file: Path) -> None:
        parts = read_packed(file)
        for name, module in modules.items():
            module.restore({part: parts[f"{name}.{part}"].to(device) for part in module.parts})

    def pack() -> None:
        for name, module in modules.items():
            module.store(read_tensor(places[f"{name}.weight"]).to(device))

    def packed() -> Mapping[str, Tensor]:
        found = ((name, module.matrix.named_buffers()) for name, module in modules.items())
        return {f"{name}.{part}": tensor for name, parts in found for part, tensor in parts}

    return read_or_pack(
        _conversion([places[f"{name}.weight"] for name in modules], quantization, path, device),
        read=read,
        pack=pack,
        packed=packed,
        write=lambda file, arrays: save_file(dict(arrays), file),
    )


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """With their paths."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear))


def _conversion(
    matrices: list[TensorInfo], quantization: Quantization, path: Path, device: torch.device
) -> Conversion | None:
    made_by = versions() | ({"bitsandbytes": version("bitsandbytes")} if quantization == "4bit" else {})
    facts = {
        "quantization": quantization,
        "matrices": [matrix.name for matrix in matrices],
        "device": device.type,
        "pytorch": made_by,
    }
    return conversion_of(path, facts, sum(matrix.bytes for matrix in matrices))

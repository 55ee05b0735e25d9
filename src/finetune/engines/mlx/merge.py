"""Merges an adapter into a base of any form: float, quantised on loading, or quantised in its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from finetune.config.schema import ModelConfig
from finetune.core.types import FloatArray, MergeReport
from finetune.engines.merging import Stored, WeightFiles, merge_files, require_new
from finetune.engines.mlx.adapters import read_for
from finetune.engines.mlx.loading import OpenedModel, is_quantized, open_unread, read_files
from finetune.engines.mlx.quantize import BITS, Packed, quantizable, require_same_bits
from finetune.engines.mlx.saving import TYPE_NAMES, save_shard


def merge_adapter(
    base: Path, *, model_config: ModelConfig, adapter: Path, destination: Path, dequantize: bool = False
) -> MergeReport:
    """Write a whole model directory at `destination`, which must be new or empty, and appears only when it is whole.

    Raises ModelError where adapter and base do not fit.
    """
    require_new(destination)
    opened = open_unread(base, model_config)
    layout = opened.layout
    quantized = is_quantized(opened.model)
    if quantized and model_config.quantization is not None:
        require_same_bits(opened.model, model_config.quantization, str(base))
    read = read_for(opened.model, layout, adapter)
    tensors = read_files(base)
    files: WeightFiles
    if quantized:
        files = QuantizedFiles(opened, tensors, dequantize=dequantize)
    else:
        files = FloatFiles(opened, tensors, model_config)
    return merge_files(
        base,
        destination,
        read,
        files,
        names=lambda module: {f"{module}.weight", layout.short_name(f"{module}.weight")},
        transposed=layout.transposes,
        config=lambda document: _float_config(document, opened.stored) if quantized and dequantize else document,
    )


def _float_config(document: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """config.json of a model whose weights are not quantised any more."""
    kept = {key: value for key, value in document.items() if key not in {"quantization", "quantization_config"}}
    names = {"dtype", "torch_dtype"} & kept.keys() or {"dtype"}
    return kept | dict.fromkeys(names, TYPE_NAMES[dtype])


class FloatFiles:
    """Floating point files; `model.quantization` puts what the trained model computed with in their place."""

    def __init__(self, opened: OpenedModel, tensors: dict[str, Any], model_config: ModelConfig) -> None:
        self._tensors = tensors
        self._layout, self._dtype = opened.layout, opened.dtype
        self._bits = 0
        self._groups: dict[str, int] = {}  # by the name of the file's tensor, as short as it goes
        if model_config.quantization is not None:
            self._bits = BITS[model_config.quantization]
            for path, size in quantizable(opened.model).items():
                self._groups[opened.layout.short_name(opened.layout.file_name(f"{path}.weight"))] = size

    def read(self, name: str) -> FloatArray:
        return _numpy(self._values(name))

    def store(self, name: str, values: FloatArray) -> Stored:
        array = mx.array(values).astype(self._tensors.pop(name).dtype)
        return Stored({name: array}, _numpy(array))

    def keep(self, name: str) -> Mapping[str, Any]:
        values = self._values(name)
        return {name: values.astype(self._tensors.pop(name).dtype)}

    def write(self, file: Path, tensors: Mapping[str, Any]) -> None:
        save_shard(file, tensors)

    def _values(self, name: str) -> Any:
        array = self._tensors[name]
        size = self._groups.get(self._layout.short_name(name))
        if size is None:
            return array
        weight = (array.T if self._layout.transposes else array).astype(self._dtype)
        rounded = Packed(*mx.quantize(weight, size, self._bits), size, self._bits).dense(mx.float32)
        return rounded.T if self._layout.transposes else rounded


class QuantizedFiles:
    """Quantised files, written with the same bits and groups for each layer, or as floats with `dequantize`."""

    def __init__(self, opened: OpenedModel, tensors: dict[str, Any], *, dequantize: bool) -> None:
        self._tensors = tensors
        self._stored, self._dequantize = opened.stored, dequantize
        self._layers = {
            opened.layout.file_name(f"{path}.weight"): module
            for path, module in opened.model.named_modules()
            if "scales" in module
        }

    def read(self, name: str) -> FloatArray:
        return _numpy(self._packed(name).dense(mx.float32) if name in self._layers else self._tensors[name])

    def store(self, name: str, values: FloatArray) -> Stored:
        if name not in self._layers or self._dequantize:
            dtype = self._stored if name in self._layers else self._tensors[name].dtype
            array = mx.array(values).astype(dtype)
            return Stored({name: array}, _numpy(array))
        before = self._packed(name)
        weight = mx.array(values).astype(self._stored)
        parts = mx.quantize(weight, before.group_size, before.bits, mode=before.mode)
        after = Packed(parts[0], parts[1], parts[2] if len(parts) > 2 else None, *before[3:])
        return Stored(self._named(name, after), _numpy(after.dense(mx.float32)))

    def keep(self, name: str) -> Mapping[str, Any]:
        stem, _, part = name.rpartition(".")
        if part in {"scales", "biases"} and f"{stem}.weight" in self._layers:
            return {}
        if name not in self._layers:
            return {name: self._tensors.pop(name)}
        found = self._packed(name)
        return {name: found.dense(self._stored)} if self._dequantize else self._named(name, found)

    def write(self, file: Path, tensors: Mapping[str, Any]) -> None:
        save_shard(file, tensors)

    def _packed(self, name: str) -> Packed:
        layer, stem = self._layers[name], name.removesuffix("weight")
        biases = self._tensors.get(f"{stem}biases")
        return Packed(
            self._tensors[name], self._tensors[f"{stem}scales"], biases, layer.group_size, layer.bits, layer.mode
        )

    def _named(self, name: str, found: Packed) -> dict[str, Any]:
        stem = name.removesuffix("weight")
        parts = {name: found.weight, f"{stem}scales": found.scales, f"{stem}biases": found.biases}
        return {key: array for key, array in parts.items() if array is not None}


def _numpy(array: Any) -> FloatArray:
    return np.array(array.astype(mx.float32))

"""Merges an adapter into floating point files, which a quantisation on loading turns into what was trained on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.core.types import FloatArray, MergeReport
from finetune.engines.merging import Stored, merge_files, require_new
from finetune.engines.torch.adapters import read_for
from finetune.engines.torch.loading import open_unread
from finetune.engines.torch.quantize import QuantizedLinear, quantize_linears
from finetune.engines.torch.reading import read_tensor
from finetune.engines.torch.saving import save_shard
from finetune.models.weights import TensorInfo


def merge_adapter(base: Path, *, model_config: ModelConfig, adapter: Path, destination: Path) -> MergeReport:
    """Write a whole model directory at `destination`, which must be new or empty, and appears only when it is whole.

    Raises ModelError where adapter and base do not fit, or the base's files are quantised.
    """
    require_new(destination)
    model, layout, places = open_unread(base)
    read = read_for(model, adapter)
    layers: dict[str, QuantizedLinear] = {}
    if model_config.quantization is not None:
        quantize_linears(model, model_config.quantization)
        for path, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                layers[layout.file_name(f"{path}.weight")] = module
    return merge_files(
        base,
        destination,
        read,
        FloatFiles({tensor.name: tensor for tensor in places.values()}, layers, transposed=layout.transposes),
        names=lambda module: {layout.file_name(f"{module}.weight")},
        transposed=layout.transposes,
    )


class FloatFiles:
    """The base's weights by their names in the files; `layers` are those that loading would quantise."""

    def __init__(
        self, stored: Mapping[str, TensorInfo], layers: Mapping[str, QuantizedLinear], *, transposed: bool
    ) -> None:
        self._stored = stored
        self._layers = layers
        self._transposed = transposed

    def read(self, name: str) -> FloatArray:
        return self._values(name).float().numpy()

    def store(self, name: str, values: FloatArray) -> Stored:
        tensor = torch.from_numpy(values).to(read_tensor(self._stored[name]).dtype)
        return Stored({name: tensor.contiguous()}, tensor.float().numpy())

    def keep(self, name: str) -> Mapping[str, Tensor]:
        if name not in self._stored:  # a buffer that models compute themselves, or a copy of a tied weight
            return {}
        return {name: self._values(name).contiguous()}

    def write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        save_shard(file, tensors)

    def _values(self, name: str) -> Tensor:
        """In the type of the files."""
        tensor = read_tensor(self._stored[name])
        layer = self._layers.get(name)
        if layer is None:
            return tensor
        layer.store(tensor)
        dense = layer.dense(torch.float32)
        del layer.matrix
        return (dense.T if self._transposed else dense).to(tensor.dtype)

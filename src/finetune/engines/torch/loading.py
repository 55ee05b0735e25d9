"""Loads a base model from a local directory, with every name and shape checked before a weight is read.

The model is built without memory for its matrices; each tensor of the files is then read into its place, one at a
time, so that the peak is the model and one tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError, UsageError
from finetune.engines.torch import compat
from finetune.engines.torch.attention import register
from finetune.engines.torch.device import pick_device, pick_dtype
from finetune.engines.torch.fused import fuse
from finetune.engines.torch.head import SplitModel, split_model
from finetune.engines.torch.layout import Layout, layout_of
from finetune.engines.torch.packing_cache import pack_weights, quantized_modules
from finetune.engines.torch.quantize import QuantizedLinear, quantization_problems, quantize_linears
from finetune.engines.torch.reading import floating_type, read_tensor
from finetune.models.drawing import draw_weight
from finetune.models.fitting import require_fit
from finetune.models.weights import TensorInfo, read_model_weights


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model in memory, its parts, and how its files name them."""

    path: Path
    name: str
    config: Any
    model: Any
    split: SplitModel
    layout: Layout
    dtype: torch.dtype  # of the products
    device: torch.device
    notices: tuple[str, ...] = ()  # what a person should know about how it was loaded

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return compat.vocabulary_of(self.config)


def load_base(path: Path, model_config: ModelConfig, *, seed: int = 0) -> BaseModel:
    """Read the directory, or draw the weights from `seed` where the configuration says `init: random`.

    Raises ModelError for anything that does not fit together, UsageError for a device that the machine lacks.
    """
    if problems := quantization_problems(model_config.quantization):
        raise UsageError(problems[0])
    device = pick_device(model_config.device)
    config = read_config(path)
    notices: tuple[str, ...] = ()
    if model_config.init == "random":
        dtype = pick_dtype(model_config.dtype, torch.float32, device)
        model, layout = _build(config, dtype), Layout(config.model_type)
        weights = _drawn(model, config, seed)
        _quantize(model, model_config)
    else:
        stored = stored_weights(path)
        dtype = pick_dtype(model_config.dtype, floating_type(stored), device)
        model = _build(config, dtype)
        layout, places = checked_places(path, model, stored)
        _quantize(model, model_config)
        if model_config.quantization is not None:
            notices = pack_weights(model, places, model_config.quantization, path, device)
        packed = {f"{name}.weight" for name, _ in quantized_modules(model)}
        weights = ((name, read_tensor(tensor)) for name, tensor in places.items() if name not in packed)
    _fill(model, weights, dtype, device)
    model.to(device)
    fuse(model)
    return BaseModel(path, model_config.name, config, model, split_model(model), layout, dtype, device, notices)


def _quantize(model: Any, model_config: ModelConfig) -> None:
    if model_config.quantization is not None:
        compat.return_large_blocks()
        quantize_linears(model, model_config.quantization)


def read_config(path: Path) -> Any:
    """config.json, of a model whose weights this engine reads. Raises ModelError."""
    config = compat.read_config(path)
    if getattr(config, "quantization", None):
        raise ModelError(
            f"{path} is quantised for MLX, which PyTorch cannot compute with. Use model.backend=mlx, or the original "
            "model with model.quantization."
        )
    if found := compat.quantization_of(config):
        raise ModelError(
            f"The weights in {path} are quantised by {found.get('quant_method')}, which cannot be loaded. Use the "
            "original model with model.quantization."
        )
    return config


def _build(config: Any, dtype: torch.dtype) -> Any:
    model = compat.build_model(config, dtype, register())
    return model.requires_grad_(requires_grad=False)


def open_unread(path: Path) -> tuple[Any, Layout, Mapping[str, TensorInfo]]:
    """The model, its layout and the file's tensor for each parameter; names and shapes checked, no weight read."""
    model = _build(read_config(path), torch.float32)
    layout, places = checked_places(path, model, stored_weights(path))
    return model, layout, places


def stored_weights(path: Path) -> tuple[TensorInfo, ...]:
    """The weights in the files of a directory, without the buffers that some files hold beside them."""
    return tuple(tensor for tensor in read_model_weights(path) if not compat.is_stored_buffer(tensor.name))


def checked_places(path: Path, model: Any, stored: tuple[TensorInfo, ...]) -> tuple[Layout, dict[str, TensorInfo]]:
    """The layout of the files, and the file's tensor for each parameter. Raises ModelError with every mismatch."""
    expected = {name: tuple(tensor.shape) for name, tensor in weights_of(model).items()}
    layout = layout_of(
        model.config.model_type, compat.body_prefix(model), [tensor.name for tensor in stored], list(expected)
    )
    places = {layout.parameter_name(tensor.name, expected): tensor for tensor in stored}
    for copy in compat.tied_names(model) - expected.keys():  # files may hold a tied weight twice
        places.pop(copy, None)
    require_fit(path, expected=expected, found={name: tensor.shape for name, tensor in places.items()})
    return layout, {name: places[name] for name in expected}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What the files of a model hold: its parameters, a shared one once, and its stored buffers."""
    buffers = model.state_dict(keep_vars=True).keys() & dict(model.named_buffers()).keys()
    return {**dict(model.named_parameters()), **{name: model.get_buffer(name) for name in sorted(buffers)}}


def _fill(model: Any, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device) -> None:
    for name, tensor in weights:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.store(tensor.to(device))
            continue
        value = tensor.to(device=device, dtype=dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    compat.tie_weights(model)


def _drawn(model: Any, config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    std = compat.initializer_range(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in weights_of(model).items()}
    return (
        (name, torch.from_numpy(draw_weight(name, shape, config.model_type, std, seed)))
        for name, shape in shapes.items()
    )

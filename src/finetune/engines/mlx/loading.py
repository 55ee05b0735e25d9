"""Loads a base model from a local directory, with every name and shape checked and reported at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import DTYPES, use_device
from finetune.engines.mlx.head import SplitModel, split_model
from finetune.engines.mlx.layout import Layout, layout_of, without_prefix
from finetune.engines.mlx.packing_cache import pack_weights
from finetune.engines.mlx.quantize import (
    BITS,
    left_float,
    quantizable,
    quantize_layers,
    require_same_bits,
    suit_device,
)
from finetune.models.drawing import draw_weight
from finetune.models.fitting import require_fit
from finetune.models.weights import read_model_weights


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model in memory, its parts, and how its files name them."""

    path: Path
    name: str
    config: Mapping[str, Any]
    model: Any
    split: SplitModel
    layout: Layout
    dtype: Any  # of the computation
    notices: tuple[str, ...] = ()  # what a person should know about how it was loaded

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.config.get("vocab_size") or self.config["text_config"]["vocab_size"])


def load_base(path: Path, model_config: ModelConfig, *, seed: int = 0) -> BaseModel:
    """Read the directory, or draw the weights from `seed` where the configuration says `init: random`.

    Raises ModelError for anything that does not fit together, UsageError for a device that the machine lacks.
    """
    use_device(model_config.device)
    config = compat.read_config(path)
    model = compat.build_model(config)
    if model_config.init == "random":
        layout = Layout(str(config["model_type"]))
        dtype = _dtype(model_config, mx.float32)
        weights = dict(_random_weights(model, config, layout, seed))
    else:
        weights, layout, stored = _read_weights(path, model, config)
        dtype = _dtype(model_config, stored)
    weights = {name: _cast(array, dtype) for name, array in weights.items()}
    notices: tuple[str, ...] = ()
    if model_config.quantization is not None:
        notices = _quantize(model, weights, model_config.quantization, path)
    suit_device(model)
    model.load_weights(list(weights.items()))
    model.eval()
    _evaluate(model, path)
    split = split_model(model, config)
    mx.clear_cache()  # what was read to be packed is not needed again
    return BaseModel(path, model_config.name, config, model, split, layout, dtype, notices)


def _dtype(model_config: ModelConfig, stored: Any) -> Any:
    if model_config.dtype != "auto":
        return DTYPES[model_config.dtype]
    return mx.float32 if compat.on_cpu() else stored


def _cast(array: Any, dtype: Any) -> Any:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize(model: Any, weights: dict[str, Any], wanted: str, path: Path) -> tuple[str, ...]:
    """Pack the weights as `model.quantization` wants, and say what cannot be; packed files stay as they are."""
    if is_quantized(model):
        require_same_bits(model, wanted, str(path))
        return ()
    left, groups = left_float(model), quantizable(model)
    with _readable(path):
        notices = pack_weights(weights, groups, BITS[wanted], path)
    quantize_layers(model, groups, BITS[wanted])
    if not left:
        return notices
    names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in left}))
    return (
        *notices,
        f"model.quantization={wanted}: {len(left)} modules ({names}) stay float: no group size divides their rows.",
    )


def _evaluate(model: Any, path: Path) -> None:
    with _readable(path):
        for _, array in tree_flatten(model.parameters()):  # together, all would be read before any is converted
            mx.eval(array)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Files are read when their arrays are first computed with: say so where that fails."""
    try:
        yield
    except RuntimeError as error:
        raise ModelError(f"The weights in {path} cannot be read: {error}. Copy the model again.") from None


def _read_weights(path: Path, model: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], Layout, Any]:
    """Checked parameters, the names of their files, and the type that they are stored in."""
    model_type = str(config["model_type"])
    files = without_prefix(model_type, read_files(path))
    weights = compat.sanitize(model, dict(files))
    compat.quantize_like(model, config, weights)
    expected = dict(tree_flatten(model.parameters()))
    if "lm_head.weight" not in expected and config.get("tie_word_embeddings", True):
        weights.pop("lm_head.weight", None)  # a copy of the tied embedding
    require_fit(path, expected=_shapes(expected), found=_shapes(weights))
    floating = [array.dtype for array in files.values() if mx.issubdtype(array.dtype, mx.floating)]
    return weights, layout_of(model_type, files, weights), max(set(floating), key=floating.count)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model whose names and shapes are checked, with no weight read from the disk."""

    model: Any
    layout: Layout
    stored: Any  # type of the files' floats
    dtype: Any  # of the computation


def open_unread(path: Path, model_config: ModelConfig) -> OpenedModel:
    """Check the files of a model without reading its weights."""
    use_device(model_config.device)
    config = compat.read_config(path)
    model = compat.build_model(config)
    _, layout, stored = _read_weights(path, model, config)
    return OpenedModel(model, layout, stored, _dtype(model_config, stored))


def read_parameters(base: BaseModel) -> dict[str, Any]:
    """The parameters that `base.path` holds now, checked against the model in memory."""
    weights, _, _ = _read_weights(base.path, base.model, base.config)
    return weights


def read_files(path: Path) -> dict[str, Any]:
    """Every tensor of the model's files; each is read when it is first computed with."""
    stored = read_model_weights(path)  # checks headers and lengths, which mx.load does not
    weights: dict[str, Any] = {}
    for file in sorted({tensor.file for tensor in stored}):
        try:
            tensors: Any = mx.load(str(file))
        except (RuntimeError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}. Copy the file again.") from None
        weights.update(tensors)
    return weights


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _random_weights(model: Any, config: Mapping[str, Any], layout: Layout, seed: int) -> Iterator[tuple[str, Any]]:
    """Drawn in the shapes of the files, so that all engines start from the same point."""
    std = float(config.get("initializer_range") or 0.02)
    transposed = layout.transposed(model)
    for name, parameter in tree_flatten(model.parameters()):
        shape = parameter.shape[::-1] if name in transposed else parameter.shape
        drawn = draw_weight(layout.file_name(name), tuple(shape), str(config["model_type"]), std, seed)
        yield name, mx.array(drawn.T if name in transposed else drawn)


def is_quantized(model: Any) -> bool:
    """True where some layer's weights are quantised."""
    return any(isinstance(module, nn.QuantizedLinear) for _, module in model.named_modules())

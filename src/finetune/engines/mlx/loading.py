"""Loads a base model from a local directory, with every name and shape checked and reported at once."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError
from finetune.engines.mlx import compat
from finetune.engines.mlx.head import SplitModel, split_model
from finetune.engines.mlx.layout import Layout, layout_of, without_prefix
from finetune.engines.mlx.quantize import (
    BITS,
    quantizable,
    quantize_layers,
    quantize_weights,
    require_same_bits,
    suit_device,
)

_INDEX = "model.safetensors.index.json"
_REPORTED = 20  # mismatches spelt out; the rest is counted


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

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.config.get("vocab_size") or self.config["text_config"]["vocab_size"])


def load_base(path: Path, model_config: ModelConfig, *, seed: int = 0) -> BaseModel:
    """Read the directory, or draw the weights from `seed` where the configuration says `init: random`.

    Raises ModelError for anything that does not fit together.
    """
    config = compat.read_config(path)
    model = compat.build_model(config)
    if model_config.init == "random":
        layout = Layout(str(config["model_type"]))
        dtype = _dtype(model_config, mx.float32)
        weights = _random_weights(model, config, seed)
    else:
        weights, layout, stored = _read_weights(path, model, config)
        dtype = _dtype(model_config, stored)
    weights = {name: _cast(array, dtype) for name, array in weights.items()}
    if model_config.quantization is not None:
        _quantize(model, weights, model_config.quantization, path)
    suit_device(model)
    model.load_weights(list(weights.items()))
    model.eval()
    _evaluate(model, path)
    return BaseModel(path, model_config.name, config, model, split_model(model, config), layout, dtype)


def _dtype(model_config: ModelConfig, stored: Any) -> Any:
    if model_config.dtype != "auto":
        return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[model_config.dtype]
    return mx.float32 if compat.on_cpu() else stored


def _cast(array: Any, dtype: Any) -> Any:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize(model: Any, weights: dict[str, Any], wanted: str, path: Path) -> None:
    """Pack the weights as `model.quantization` wants; files that are packed so already stay as they are."""
    if is_quantized(model):
        require_same_bits(model, wanted, str(path))
        return
    groups = quantizable(model)
    with _readable(path):
        quantize_weights(weights, groups, BITS[wanted])
    quantize_layers(model, groups, BITS[wanted])


def _evaluate(model: Any, path: Path) -> None:
    with _readable(path):
        mx.eval(model.parameters())


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
    problems = _mismatches(expected, weights)
    if problems:
        raise ModelError(_report(path, problems))
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
    config = compat.read_config(path)
    model = compat.build_model(config)
    _, layout, stored = _read_weights(path, model, config)
    return OpenedModel(model, layout, stored, _dtype(model_config, stored))


def read_parameters(base: BaseModel) -> dict[str, Any]:
    """The parameters that `base.path` holds now, checked against the model in memory."""
    weights, _, _ = _read_weights(base.path, base.model, base.config)
    return weights


def weight_files(path: Path) -> list[Path]:
    """The model's safetensors files: those of the index where there is one."""
    index = path / _INDEX
    if not index.is_file():
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise ModelError(f"{path} holds no model*.safetensors weights. Copy the model again, or choose another.")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}. Copy the model again.") from None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ModelError(f"{path} lacks files that its index names: {', '.join(missing)}. Copy the model again.")
    return [path / name for name in names]


def read_files(path: Path) -> dict[str, Any]:
    """Every tensor of the model's files; each is read when it is first computed with."""
    weights: dict[str, Any] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="np"):  # checks the header and the length, which mx.load does not
                pass
            tensors: Any = mx.load(str(file))
            weights.update(tensors)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}. Copy the file again.") from None
    return weights


def _mismatches(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    problems = [f"{name} {expected[name].shape} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} {found[name].shape} does not belong to the model" for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} has shape {found[name].shape}, and config.json needs {expected[name].shape}")
    return problems


def _report(path: Path, problems: list[str]) -> str:
    count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
    lines = [f"The weights in {path} do not fit its config.json; {count} not match:", *problems[:_REPORTED]]
    if len(problems) > _REPORTED:
        lines.append(f"... and {len(problems) - _REPORTED} more")
    return "\n  ".join(lines) + "\nCopy the model again, or correct config.json."


def _random_weights(model: Any, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Matrices normal(0, initializer_range), norms 1 (gemma stores them as an offset from 1: 0), biases 0.

    Each weight has its own stream, derived from the seed and its name.
    """
    std = float(config.get("initializer_range") or 0.02)
    norm = 0.0 if str(config["model_type"]).startswith("gemma") else 1.0
    weights = {}
    for name, parameter in tree_flatten(model.parameters()):
        leaf = name.rsplit(".", 1)[-1]
        if parameter.ndim >= 2:
            weights[name] = mx.random.normal(parameter.shape, scale=std, key=_key(seed, name))
        elif leaf in {"weight", "bias"}:
            weights[name] = mx.full(parameter.shape, norm if leaf == "weight" else 0.0)
        else:
            raise ModelError(f"init: random does not know how to draw {name} of a {config['model_type']} model.")
    return weights


def _key(seed: int, name: str) -> Any:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:7], "little"))


def is_quantized(model: Any) -> bool:
    """True where some layer's weights are quantised."""
    return any(isinstance(module, nn.QuantizedLinear) for _, module in model.named_modules())

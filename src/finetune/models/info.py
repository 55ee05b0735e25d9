"""What a model is, from config.json and the headers of its weights: sizes, and what tuning it would take.

Nothing is loaded: a model of any size is described in milliseconds.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.types import Dtype
from finetune.models.source import ModelSource
from finetune.models.weights import TensorInfo, read_weights

# Modules that look up or produce tokens: `all-linear` leaves them out, as they are not what LoRA adapts.
NOT_ADAPTED = frozenset(
    {"embed_tokens", "embed_positions", "word_embeddings", "tok_embeddings", "wte", "wpe", "embed_in"}
    | {"lm_head", "embed_out", "output"}
)
# Tables beside the packed weights of a quantised layer (MLX): not parameters of the model.
QUANTIZATION_TABLES = ("scales", "biases")

# Types in safetensors' terms.
DTYPES: Mapping[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A module that LoRA can adapt."""

    name: str
    in_features: int
    out_features: int

    def lora_parameters(self, rank: int) -> int:
        """Parameters of A [rank, in] and B [out, rank]."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The figures of one model directory."""

    source: ModelSource
    parameters: int
    dtype: str  # of most of the parameters, in safetensors' terms
    bits: int | None  # of a quantised base
    weight_bytes: int
    has_chat_template: bool
    linear_modules: tuple[LinearModule, ...]

    def lora_parameters(self, rank: int) -> int:
        """Trainable parameters of LoRA on all linear modules."""
        return sum(module.lora_parameters(rank) for module in self.linear_modules)


def stored_dtype(path: Path) -> Dtype:
    """The floating point type that most tensors of a model directory are stored in. Raises as `read_weights` does."""
    counts = Counter(DTYPES[tensor.dtype] for tensor in read_weights(path) if tensor.dtype in DTYPES)
    return counts.most_common(1)[0][0] if counts else "float32"


def stored_bits(config: Mapping[str, Any]) -> str | None:
    """How a `config.json` says its files are quantised: "4 bits", the name of a method, or None for plain ones."""
    bits = quantization_of(config)[1]
    if bits is not None:
        return f"{bits} bits"
    other = config.get("quantization_config")
    return str(other.get("quant_method", "unknown")) if isinstance(other, dict) else None


def describe_model(source: ModelSource) -> ModelInfo:
    """Read the headers of a resolved model. Raises ModelError as `read_weights` does."""
    tensors = read_weights(source.path)
    by_name = {tensor.name: tensor for tensor in tensors}
    group, bits = quantization_of(source.config)
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += _elements(tensor, by_name, group)
    return ModelInfo(
        source=source,
        parameters=counts.total(),
        dtype=counts.most_common(1)[0][0] if counts else "",
        bits=bits,
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        has_chat_template=_has_chat_template(source),
        linear_modules=tuple(_linear_modules(tensors, by_name, group)),
    )


def quantization_of(config: Mapping[str, Any]) -> tuple[int, int | None]:
    """Group size and bits of an MLX-quantised base; bits is None for a plain one."""
    found = config.get("quantization") or {}
    if not isinstance(found, dict) or not isinstance(found.get("bits"), int):
        return 64, None
    return int(found.get("group_size", 64)), int(found["bits"])


def _elements(tensor: TensorInfo, by_name: Mapping[str, TensorInfo], group: int) -> int:
    """Parameters that a stored tensor stands for: packed weights hold several in one word."""
    module, _, kind = tensor.name.rpartition(".")
    scales = by_name.get(f"{module}.scales")
    if kind in QUANTIZATION_TABLES and f"{module}.scales" in by_name:
        return 0
    if kind == "weight" and scales is not None:
        return scales.elements * group
    return tensor.elements


def _linear_modules(tensors: Sequence[TensorInfo], by_name: Mapping[str, TensorInfo], group: int) -> list[LinearModule]:
    found = []
    for tensor in tensors:
        module, _, kind = tensor.name.rpartition(".")
        if kind != "weight" or len(tensor.shape) != 2 or module.rpartition(".")[2] in NOT_ADAPTED:
            continue
        scales = by_name.get(f"{module}.scales")
        columns = tensor.shape[1] if scales is None else scales.shape[1] * group
        found.append(LinearModule(module, columns, tensor.shape[0]))
    return found


def _has_chat_template(source: ModelSource) -> bool:
    if (source.path / "chat_template.jinja").is_file() or (source.path / "chat_template.json").is_file():
        return True
    file = source.path / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text(encoding="utf-8")

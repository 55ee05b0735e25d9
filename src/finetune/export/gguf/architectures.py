"""How each architecture that this package knows is called and laid out in llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import ModelError

_SILU = frozenset({"silu", "swish"})
_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new"})
_GEMMA_GELU = _GELU | {"gelu"}  # Gemma 1's files say gelu and mean the tanh form
_WIDE_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27 B models, whose scale llama.cpp computes by itself


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of llama.cpp's architectures, and what its tensors need on the way there."""

    name: str
    activations: frozenset[str]
    permutes: bool = False  # rows of q and k: pairs of a rotation lie side by side, not half a head apart
    norm_offset: float = 0.0  # norms whose stored weight is added to one
    transposes: bool = False  # linear weights are stored as (in, out)
    sees_windows: bool = False  # llama.cpp limits attention to the sliding window in its layers
    always_tied: bool = False


_LLAMA = Architecture("llama", _SILU, permutes=True)
_GEMMAS = {
    name: Architecture(name, _GEMMA_GELU, norm_offset=1.0, sees_windows=name != "gemma", always_tied=True)
    for name in ("gemma", "gemma2", "gemma3")
}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _SILU),
    "qwen3": Architecture("qwen3", _SILU),
    **_GEMMAS,
    "gemma3_text": _GEMMAS["gemma3"],
    "phi3": Architecture("phi3", _SILU),
    "gpt2": Architecture("gpt2", _GELU, transposes=True),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's architecture and its full configuration, defaults written out."""

    architecture: Architecture
    config: Mapping[str, Any]

    @property
    def layers(self) -> int:
        return int(self._first("num_hidden_layers", "n_layer"))

    @property
    def width(self) -> int:
        return int(self._first("hidden_size", "n_embd"))

    @property
    def heads(self) -> int:
        return int(self._first("num_attention_heads", "n_head"))

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_width(self) -> int:
        return int(self.config.get("head_dim") or self.width // self.heads)

    @property
    def context(self) -> int:
        return int(self._first("max_position_embeddings", "n_positions"))

    @property
    def feed_forward(self) -> int:
        inner = self.config.get("intermediate_size") or self.config.get("n_inner")
        return int(inner or 4 * self.width)

    @property
    def tied(self) -> bool:
        return self.architecture.always_tied or bool(self.config.get("tie_word_embeddings"))

    @property
    def rope(self) -> Mapping[str, Any]:
        """Of the layers that see everything, where an architecture has two kinds."""
        found = self.config.get("rope_parameters") or {}
        return dict(found.get("full_attention", found))

    @property
    def local_rope(self) -> Mapping[str, Any]:
        """Of the layers with a window; empty where all are alike."""
        return dict((self.config.get("rope_parameters") or {}).get("sliding_attention", {}))

    def _first(self, *names: str) -> Any:
        return next(self.config[name] for name in names if self.config.get(name) is not None)


def read_shape(model: Path) -> Shape:
    """The shape of a model directory. Raises ModelError for what llama.cpp, or this package, has no form for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{model} is of the architecture {kind}, which cannot be written as GGUF. "
            f"Known are {', '.join(sorted(ARCHITECTURES))}. Use --format merged."
        )
    shape = Shape(ARCHITECTURES[kind], config.get_text_config().to_dict())
    problems = list(_problems(shape))
    if problems:
        listed = "\n  ".join(problems)
        raise ModelError(
            f"{model} computes something that llama.cpp's {kind} does not:\n  {listed}\nUse --format merged."
        )
    return shape


def _problems(shape: Shape) -> list[str]:
    config, name = shape.config, shape.architecture.name
    problems = []
    activation = str(config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function"))
    if activation not in shape.architecture.activations:
        problems.append(f"its activation is {activation}")
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
        problems.append("it scales attention in its own way (scale_attn_*)")
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != shape.head_width and shape.layers != _WIDE_GEMMA.get(name):
        problems.append(f"query_pre_attn_scalar is {scalar} and not the head's width {shape.head_width}")
    problems += _window_problems(shape)
    rope = str(shape.rope.get("rope_type", "default"))
    known = {"default", "linear", "llama3", "yarn"} if name != "phi3" else {"default", "longrope", "su"}
    if rope not in known:
        problems.append(f"its positions are stretched by {rope}")
    return problems


def _window_problems(shape: Shape) -> list[str]:
    """Layers with a window where llama.cpp has none, or the other way round."""
    every = {"gemma2": 2, "gemma3": 6}.get(shape.architecture.name)
    kinds = shape.config.get("layer_types")
    if every is None or kinds is None:
        return []
    expected = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(shape.layers)]
    return [] if list(kinds) == expected else [f"its layers with a window are not all but each {every}th"]


def window_notice(shape: Shape) -> str | None:
    """What to say where the model limits attention to a window, and llama.cpp lets it see everything."""
    config = shape.config
    window = config.get("sliding_window")
    if shape.architecture.sees_windows or window is None or config.get("use_sliding_window") is False:
        return None
    if int(window) >= shape.context:
        return None
    return (
        f"llama.cpp has no sliding window for this architecture: up to {window:,} tokens it computes the same, "
        "longer texts are attended to as a whole."
    )

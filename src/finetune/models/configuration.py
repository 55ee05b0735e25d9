"""What a model's config.json may say: numbers in a range that some machine could hold, objects where objects belong.

The libraries that build a model believe what they read: they would loop over a thousand million layers, or fail
with an error of their own. Every problem is said at once, before anything is built.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.core.errors import ModelError

# Key -> the most that it may be; all must be whole numbers from 1 on. Lists hold one value for each layer.
_LIMITS: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "head_dim"), 10_000_000),
    **dict.fromkeys(("vocab_size", "padded_vocab_size", "n_vocab"), 100_000_000),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 100_000),
}
_OBJECTS = frozenset(("text_config", "quantization", "quantization_config", "rope_parameters", "rope_scaling"))
_FRACTIONS = frozenset(
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "initializer_range", "rope_theta")
)
_ACTIVATIONS = frozenset(("hidden_act", "hidden_activation", "activation_function"))
# Those that transformers knows; mlx-lm takes no notice of the name.
_KNOWN_ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "laplace"),
        *("leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
        *("swish", "tanh", "xielu"),
    }
)
_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_BITS, _GROUPS = range(2, 9), (16, 32, 64, 128)
_EXPERTS_MAY_BE_NONE = {"num_local_experts", "num_experts", "n_routed_experts"}


def require_plausible(file: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError with every value of a config.json that no model can have."""
    problems = list(_problems(config))
    if not problems and isinstance(config.get("text_config"), dict):
        problems = [f"text_config.{problem}" for problem in _problems(config["text_config"])]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ModelError(f"{file} cannot describe a model:\n{listed}\nCopy or download it again.")


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    if not _MODEL_TYPE.fullmatch(str(config.get("model_type", "llama"))):
        yield f"model_type is {_shown(config['model_type'])}; it must be a name such as llama"
    given = {key: value for key, value in config.items() if value is not None}
    for key in given.keys() & _LIMITS.keys():
        yield from _of_count(key, given[key], _LIMITS[key])
    for keys, fits, wanted in _KINDS:
        for key in sorted(given.keys() & keys):
            if not fits(given[key]):
                yield f"{key} is {_shown(given[key])}; {wanted}"
    if isinstance(config.get("quantization"), dict):
        yield from _of_quantization(config["quantization"])


def _of_count(key: str, value: Any, most: int) -> Iterator[str]:
    least = 0 if key in _EXPERTS_MAY_BE_NONE else 1
    for one in value if isinstance(value, list) and value else [value]:
        if not isinstance(one, int) or isinstance(one, bool) or not least <= one <= most:
            yield f"{key} is {_shown(value)}; it must be a whole number from {least} to {most:,}"
            return


def _of_quantization(found: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in (("bits", _BITS), ("group_size", _GROUPS)):
        value = found.get(key, allowed[0])
        if isinstance(value, bool) or value not in allowed:
            yield f"quantization.{key} is {_shown(value)}; it must be one of {', '.join(map(str, allowed))}"


def _is_number(value: Any) -> bool:
    """Some architectures have one number for each layer."""
    numbers = value if isinstance(value, list) else [value]
    return all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in numbers)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# Keys, what their values must be, and how that is said.
_KINDS: tuple[tuple[frozenset[str], Callable[[Any], bool], str], ...] = (
    (_FRACTIONS, _is_number, "it must be a number"),
    (_OBJECTS, lambda value: isinstance(value, dict), "it must be an object"),
    (_ACTIVATIONS, lambda value: str(value) in _KNOWN_ACTIVATIONS, "no activation has that name"),
)

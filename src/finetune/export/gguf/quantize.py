"""Which type each tensor gets, and its values in that type.

Norms, biases and position tables stay float32. The K-quants mix types as `llama-quantize` does: more bits for
attention's values and the feed-forward's output in the layers where they matter, six for the head.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.core.errors import ModelError, UsageError
from finetune.core.types import FloatArray
from finetune.export import llamacpp

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
# Where a row is not a whole number of blocks of 256: the type of blocks of 32 next to it in size.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LARGEST_LAYERS = 80  # 70 B models share each row of attention's values between eight heads


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's layer in a model, as far as mixtures depend on it."""

    layer: int
    layers: int
    group: int  # heads that share a key and a value


_Rule = tuple[Callable[[Place], bool], str]


def _always(_place: Place) -> bool:
    return True


def _first(count: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < count


def _first_part(divisor: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < place.layers // divisor


def _more_bits(place: Place) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def _shared(place: Place) -> bool:
    return place.group >= 4


_ALL_Q5: tuple[_Rule, ...] = ((_always, "Q5_K"),)
_SOME_Q6: tuple[_Rule, ...] = ((_more_bits, "Q6_K"),)
_MIXTURES: Mapping[str, Mapping[str, tuple[_Rule, ...]]] = {
    "q2_k": {
        "attn_v": ((_shared, "Q4_K"), (_always, "Q3_K")),
        "ffn_down": ((_always, "Q3_K"),),
        "attn_output": ((_always, "Q3_K"),),
    },
    "q3_k_m": {
        "attn_v": ((_first(2), "Q5_K"), (_always, "Q4_K")),
        "ffn_down": ((_first_part(16), "Q5_K"), (_always, "Q4_K")),
        "attn_output": ((_always, "Q4_K"),),
    },
    "q3_k_l": {"attn_v": _ALL_Q5, "ffn_down": _ALL_Q5, "attn_output": _ALL_Q5},
    "q4_k_s": {"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_first_part(8), "Q5_K"),)},
    "q4_k_m": {"attn_v": _SOME_Q6, "ffn_down": _SOME_Q6},
    "q5_k_m": {"attn_v": _SOME_Q6, "ffn_down": _SOME_Q6},
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a person calls a quantisation: llama.cpp's number for it, and the type of most tensors."""

    name: str
    file_type: str  # a member of gguf.LlamaFileType
    base: str  # a member of gguf.GGMLQuantizationType

    @property
    def is_float(self) -> bool:
        return self.base in {"F32", "F16", "BF16"}

    @property
    def needs_llamacpp(self) -> bool:
        """Whether only llama.cpp's own code computes it."""
        return self.base.endswith("_K")


def _schemes() -> Mapping[str, Scheme]:
    plain = {name: name.upper() for name in ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q6_k")}
    mixed = {f"q{bits}_k_{size}": f"Q{bits}_K" for bits, sizes in ((3, "sml"), (4, "sm"), (5, "sm")) for size in sizes}
    schemes = {name: Scheme(name, f"MOSTLY_{name.upper()}", base) for name, base in (plain | mixed).items()}
    return {"f32": Scheme("f32", "ALL_F32", "F32"), **schemes}


SCHEMES = _schemes()


def find_scheme(name: str) -> Scheme:
    """The scheme of a name, in either case. Raises UsageError for another, or where llama.cpp is missing for it."""
    scheme = SCHEMES.get(name.lower())
    if scheme is None:
        raise UsageError(f"--quantize {name}: GGUF has no such type here. Choose one of {', '.join(SCHEMES)}.")
    if scheme.needs_llamacpp:
        llamacpp.require_installed(f"--quantize {name}")
    return scheme


def type_of(scheme: Scheme, name: str, shape: tuple[int, ...], *, layers: int, group: int, tied: bool) -> str:
    """ggml's type for a tensor [rows, columns]; `group` is the number of heads that share a key."""
    if (
        len(shape) < 2
        or not name.endswith(".weight")
        or name.endswith("_norm.weight")
        or name == "position_embd.weight"
    ):
        return "F32"
    if scheme.is_float:
        return scheme.base
    if name == _HEAD or (tied and name == _EMBEDDING):
        wanted = "Q6_K" if scheme.needs_llamacpp else "Q8_0"
    else:
        wanted = _in_mixture(scheme, name, layers, group)
    return _fitting(wanted, shape[-1])


def _in_mixture(scheme: Scheme, name: str, layers: int, group: int) -> str:
    match = _LAYER.fullmatch(name)
    if match is None:
        return scheme.base
    kind = "attn_v" if match[2] == "attn_qkv" else match[2]
    place = Place(int(match[1]), layers, group)
    rules = _MIXTURES.get(scheme.name, {}).get(kind, ())
    chosen = next((type_name for applies, type_name in rules if applies(place)), scheme.base)
    is_thin = kind == "attn_v" and layers == _LARGEST_LAYERS and group > 1
    return "Q5_K" if is_thin and chosen in {"Q3_K", "Q4_K"} else chosen


def _fitting(wanted: str, columns: int) -> str:
    """The type itself, or the next one whose blocks divide the columns."""
    if columns % 256 and wanted.endswith("_K"):
        wanted = _FALLBACKS[wanted]
    return wanted if columns % 32 == 0 else "F16"


def stored_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in the file."""
    block, size = _block(type_name)
    return int(np.prod(shape)) // block * size


def encode(name: str, values: FloatArray, type_name: str) -> Any:
    """Values as the file holds them. Raises ModelError where float16 cannot hold one."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[type_name]
    if type_name == "F32":
        return np.ascontiguousarray(values, np.float32)
    if type_name == "F16" and float(np.abs(values).max()) > float(np.finfo(np.float16).max):
        raise ModelError(f"{name} holds values that float16 cannot: choose --quantize bf16, f32 or q8_0.")
    if type_name.endswith("_K"):
        block, size = _block(type_name)
        return llamacpp.quantize_rows(values, int(kind), values.shape[-1] // block * size)
    return quants.quantize(values, kind)


def _block(type_name: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return int(block), int(size)

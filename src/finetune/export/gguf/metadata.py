"""The keys of a GGUF file that say what the model is. Names and meanings are llama.cpp's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune.core.types import FloatArray
from finetune.export.gguf.architectures import Shape

_QUANTIZATION_VERSION = 2


def add_metadata(writer: Any, shape: Shape, *, name: str, file_type: int, rows: int) -> None:
    """Describe the model to a `gguf.GGUFWriter`. `rows` is the size of the vocabulary as the embedding has it."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    if shape.architecture.name == "gpt2":
        writer.add_layer_norm_eps(float(shape.config["layer_norm_epsilon"]))
        return
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(float(shape.config["rms_norm_eps"]))
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(_rotated(shape))
    writer.add_rope_freq_base(float(shape.rope.get("rope_theta", 10000.0)))
    _add_attention(writer, shape)
    _add_rope_scaling(writer, shape)


def _add_attention(writer: Any, shape: Shape) -> None:
    config = shape.config
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if shape.architecture.sees_windows:
        writer.add_sliding_window(int(config["sliding_window"]))
    if shape.architecture.name == "phi3":  # zero: none, where llama.cpp would guess one from the number of layers
        writer.add_sliding_window(int(config.get("sliding_window") or 0))
    if shape.local_rope:
        writer.add_rope_freq_base_swa(float(shape.local_rope.get("rope_theta", 10000.0)))


def _add_rope_scaling(writer: Any, shape: Shape) -> None:
    from gguf import RopeScalingType

    rope, kind = shape.rope, shape.rope.get("rope_type", "default")
    if kind in {"linear", "yarn"}:
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope.get("original_max_position_embeddings") or shape.context))
    if kind in {"longrope", "su"}:
        writer.add_rope_scaling_orig_ctx_len(_original_context(shape))
        writer.add_rope_scaling_attn_factors(_longrope_attention(shape))
    elif shape.architecture.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(shape.context)


def rope_tensors(shape: Shape) -> Mapping[str, FloatArray]:
    """Factors that divide the frequencies of rotations [rotated / 2]: of llama3's scaling and of longrope's."""
    rope, kind = shape.rope, shape.rope.get("rope_type")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, shape.head_width)}
    if kind in {"longrope", "su"}:
        factors = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{which}.weight": np.array(values, np.float32) for which, values in factors.items()}
    return {}


def _llama3_factors(rope: Mapping[str, Any], width: int) -> FloatArray:
    """Llama 3.1's scaling: long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    frequencies = float(rope.get("rope_theta", 10000.0)) ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    waves = 2 * math.pi / frequencies
    blend = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / factor + blend), np.float32)


def _rotated(shape: Shape) -> int:
    """Values of a head that are rotated."""
    partial = shape.rope.get("partial_rotary_factor") or shape.config.get("partial_rotary_factor") or 1.0
    return int(float(partial) * shape.head_width)


def _original_context(shape: Shape) -> int:
    original = shape.rope.get("original_max_position_embeddings")
    return int(original or shape.config["original_max_position_embeddings"])


def _longrope_attention(shape: Shape) -> float:
    """The factor of LongRoPE's attention: sqrt(1 + ln(stretch) / ln(original context)), or what the files say."""
    said = shape.rope.get("attention_factor")
    original = _original_context(shape)
    stretch = float(shape.rope.get("factor") or shape.context / original)
    if said is not None:
        return float(said)
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0

"""Everything that depends on the version of mlx or mlx-lm: private names, moved functions, changed defaults.

Both are pinned exactly in pyproject.toml; a new version is tried by changing the pins and this file.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from finetune.core.errors import ModelError
from finetune.engines.mlx import light
from finetune.engines.mlx.windows import keep_windows
from finetune.models.older_names import with_older_names

light.import_lightly()

_ATTENTION = "scaled_dot_product_attention"
_SWIGLU = "swiglu"


def versions() -> dict[str, str]:
    """Installed versions by distribution."""
    return {name: version(name) for name in ("mlx", "mlx-lm")}


def read_config(path: Path) -> dict[str, Any]:
    """config.json as mlx-lm reads it: its own corrections, and the keys that transformers 5 renamed.

    Raises ModelError where it is missing or damaged.
    """
    try:
        return with_older_names(light.utils().load_config(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {error}. Copy the model again.") from None


def build_model(config: Mapping[str, Any]) -> Any:
    """mlx-lm's model for this config.json, with weights that are not drawn until they are asked for.

    Raises ModelError for an architecture that mlx-lm lacks, or values that it does not accept.
    """
    try:
        model_class, arguments_class = light.utils()._get_classes(dict(config))
    except ValueError:
        raise ModelError(
            f"model_type {config.get('model_type')!r} is not an architecture that mlx-lm {version('mlx-lm')} has. "
            "Choose another base model."
        ) from None
    try:
        return _corrected(model_class(arguments_class.from_dict(dict(config))), config)
    except (TypeError, ValueError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(f"config.json does not describe a {config.get('model_type')} model: {error}.") from None


def _corrected(model: Any, config: Mapping[str, Any]) -> Any:
    """Undo what mlx-lm simplifies and logits show, and let GPT-2 read several documents in a row."""
    if config.get("model_type") == "gemma":
        for layer in model.layers:
            layer.mlp.__class__ = _TanhGeluMLP
    if config.get("model_type") == "gemma2":
        for layer in model.layers:
            layer.self_attn.__class__ = _masking_rows(type(layer.self_attn))
    if config.get("model_type") == "gemma3_text":
        model.model.embed_tokens.__class__ = _ExactlyScaledEmbedding
    if config.get("model_type") == "gpt2":
        model.model.__class__ = _placing_documents(type(model.model))
    keep_windows(model, config)
    return model


class _TanhGeluMLP(nn.Module):  # type: ignore[misc]
    """Gemma's MLP with the tanh form of GELU that it was trained with; mlx-lm computes the exact one."""

    def __call__(self, x: Any) -> Any:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


def _masking_rows(attention_class: type) -> type:
    """Gemma 2's attention with a mask [B, 1, N, S] of each row; mlx-lm takes one [N, S] for all rows.

    Its scores have one more axis where several queries share a key.
    """

    class Attention(attention_class):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            if mask is not None and mask.ndim == 4 and self.repeats > 1:
                mask = mask[:, :, None]
            return super().__call__(x, mask, cache)

    return Attention


class _ExactlyScaledEmbedding(nn.Embedding):  # type: ignore[misc]
    """Gemma 3 multiplies embeddings by sqrt(width), which mlx-lm rounds to bfloat16 even in float32."""

    def __call__(self, x: Any) -> Any:
        embedded = super().__call__(x)
        if embedded.dtype != mx.float32:
            return embedded
        factor = float(embedded.shape[-1] ** 0.5)
        return embedded * (factor / mx.array(factor, mx.bfloat16).astype(mx.float32))


def _placing_documents(body_class: type) -> type:
    """GPT-2's body with the positions that its cache asks for; mlx-lm's numbers a row from one offset on."""
    from mlx_lm.models.base import create_attention_mask

    class Body(body_class):  # type: ignore[misc]
        def __call__(self, inputs: Any, cache: Any = None) -> Any:
            if not cache or not hasattr(cache[0], "positions"):
                return super().__call__(inputs, cache)
            hidden = self.wte(inputs) + self.wpe(cache[0].positions(inputs.shape[1]))
            mask = create_attention_mask(hidden, cache[0])
            for layer, part in zip(self.h, cache, strict=True):
                hidden = layer(hidden, mask, cache=part)
            return self.ln_f(hidden)

    return Body


def route_attention(model: Any, mask_type: type, attend: Callable[..., Any]) -> None:
    """Send the model's calls of scaled_dot_product_attention whose mask is a `mask_type` to `attend`.

    Models import that function into their own module, where it is replaced once; calls with any other mask, of
    other users of mlx-lm too, go where they went.
    """
    for name in {type(module).__module__ for _, module in model.named_modules()}:
        original = getattr(sys.modules[name], _ATTENTION, None)
        if original is not None and not isinstance(original, _RoutedAttention):
            setattr(sys.modules[name], _ATTENTION, _RoutedAttention(original, mask_type, attend))


def replace_swiglu(model: Any, swiglu: Callable[..., Any]) -> None:
    """Let the model compute silu(gate) * up by `swiglu`, which gets mlx-lm's function as `otherwise`.

    Models import that function into their own module, where it is replaced once; its values stay the same.
    """
    from mlx_lm.models import activations

    for name in {type(module).__module__ for _, module in model.named_modules()}:
        if getattr(sys.modules[name], _SWIGLU, None) is activations.swiglu:
            setattr(sys.modules[name], _SWIGLU, partial(swiglu, otherwise=activations.swiglu))


@dataclass(frozen=True, slots=True)
class _RoutedAttention:
    """mlx-lm's attention function, with one kind of mask that it does not know."""

    original: Callable[..., Any]
    mask_type: type
    attend: Callable[..., Any]

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        mask = options.get("mask")
        if not isinstance(mask, self.mask_type):
            return self.original(*arrays, **options)
        if options.get("sinks") is not None:
            raise TypeError("attention with sinks does not take documents")
        return self.attend(*arrays, scale=options["scale"], documents=mask)


def sanitize(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The file's tensors renamed and reshaped to the model's parameters.

    Raises ModelError for a tensor that the renaming needs and the files lack.
    """
    function = getattr(type(model), "sanitize", None)  # models whose files need nothing do not define it
    if function is None:
        return weights
    try:
        return dict(function(model, weights))
    except KeyError as error:
        raise ModelError(f"The weights lack the tensor {error}.") from None


def quantize_like(model: Any, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Give the model quantised layers where the files hold quantised weights."""
    settings = config.get("quantization")
    if settings is None:
        if config.get("quantization_config"):
            raise ModelError(
                f"The weights are quantised by {config['quantization_config'].get('quant_method')}, which cannot be "
                "loaded. Use the original model, or an mlx-community conversion."
            )
        return

    def layer(path: str, module: Any) -> Any:
        if path in settings:
            return settings[path]
        if not isinstance(module, nn.Linear | nn.Embedding) or f"{path}.scales" not in weights:
            return False
        return light.utils().infer_quant_config(path, module, weights)

    nn.quantize(
        model,
        group_size=settings["group_size"],
        bits=settings["bits"],
        mode=settings.get("mode", "affine"),
        class_predicate=layer,
    )


def save_packed(model: Any, config: Mapping[str, Any], *, bits: int, group: int, destination: Path) -> None:
    """Pack a model as mlx-lm does and write its weights and config.json."""
    utils = light.utils()
    with redirect_stdout(StringIO()):  # it prints how many bits a weight has
        packed, document = utils.quantize_model(model, dict(config), group, bits)
    utils.save_model(destination, packed, donate_model=True)
    utils.save_config(document, destination / "config.json")


def new_cache(model: Any) -> list[Any]:
    """An empty key-value cache for one request."""
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def cache_windows(model: Any) -> list[int | None]:
    """How many tokens each layer keeps keys and values of; None for all."""
    windows = [getattr(layer, "sliding_window", None) for layer in model.layers]
    return [getattr(cache, "max_size", None) or window for cache, window in zip(new_cache(model), windows, strict=True)]


def device_name() -> str:
    """What the default device is, for people."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    info = mx.device_info()
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{info.get('device_name', 'gpu')} ({kind})"


def on_cpu() -> bool:
    """True where products run on the CPU, which is slow in bfloat16 and float16."""
    return bool(mx.default_device() == mx.cpu)


def has_gpu(kind: str) -> bool:
    """Whether this build of MLX finds a GPU of the kind (`metal` or `cuda`) on this machine."""
    return bool(mx.metal.is_available() if kind == "metal" else mx.cuda.is_available())

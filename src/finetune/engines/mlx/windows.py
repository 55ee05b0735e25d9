"""Sliding windows for architectures that mlx-lm computes without theirs.

Mistral 7B v0.1, Phi-3 and Gemma 2 were trained with layers that see the last few thousand tokens only. mlx-lm lets
them see everything, which is another model for every row longer than the window.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

_EVERY_LAYER = {"mistral", "phi3"}
_SOME_LAYERS = {"gemma2", "qwen2", "qwen3"}


def keep_windows(model: Any, config: Mapping[str, Any]) -> None:
    """Give each layer that config.json asks a window for a class that keeps to it."""
    window = config.get("sliding_window")
    if not window:
        return
    for layer, slides in zip(model.layers, sliding_layers(config, len(model.layers)), strict=True):
        if slides:
            layer.__class__ = _windowed(type(layer), int(window))


def sliding_layers(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers slide, for the architectures of this file, by transformers' rules; none for others."""
    kind = config.get("model_type")
    if kind in _EVERY_LAYER:
        return [True] * layers
    if kind not in _SOME_LAYERS:
        return [False] * layers
    if types := config.get("layer_types"):
        return [str(name) == "sliding_attention" for name in types]
    if kind == "gemma2":
        return [number % 2 == 0 for number in range(layers)]
    first = int(config.get("max_window_layers", layers)) if config.get("use_sliding_window") else layers
    return [number >= first for number in range(layers)]


def _read(cache: Any) -> int:
    """Tokens that the longest row has read."""
    if cache is None:
        return 0
    return int(cache.longest if hasattr(cache, "longest") else cache.offset)


def _windowed(layer_class: type, window: int) -> type:
    from mlx_lm.models.base import create_attention_mask

    class Layer(layer_class):  # type: ignore[misc]
        sliding_window = window

        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            if x.shape[1] + _read(cache) > window:
                as_array = isinstance(mask, mx.array)
                mask = create_attention_mask(x, cache, window_size=window, return_array=as_array)
            return super().__call__(x, mask, cache)

    return Layer

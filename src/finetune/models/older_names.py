"""Values of a config.json under the names that libraries before transformers 5 look for."""

from collections.abc import Mapping
from typing import Any


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model, said in older names too; what has its older name already stays as it is.

    transformers 5 writes `rope_parameters` (by layer type for gemma3) in place of `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`, and `layer_types` in place of `sliding_window_pattern`. mlx-lm and older versions of
    transformers would silently use their defaults: another model.
    """
    added: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        added["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            added[key] = rope[key]
    if rope.get("rope_type", "default") != "default":
        added["rope_scaling"] = {"type": rope["rope_type"], **rope}
    types = config.get("layer_types") or []
    if "sliding_attention" in types and "full_attention" in types:
        added["sliding_window_pattern"] = types.index("full_attention") + 1
    return {**added, **config}

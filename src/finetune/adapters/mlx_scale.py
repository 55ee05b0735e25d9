"""What mlx-lm multiplied B A by, as far as its files say.

mlx-lm multiplies by `lora_parameters.scale` alone. Until June 2024 it multiplied by scale x alpha / rank, and its
defaults (scale 10, alpha 16, rank 8) stayed in the files for longer than the rule: only files with `fine_tune_type`
or `num_layers` (since September 2024) are certain. `adapters.npz` (until April 2024) came without a configuration;
the scale was 20 and could not be chosen but in the last weeks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

DEFAULT_SCALE = 20.0
_HOW = "Give the scale, which B A was multiplied by in training, once: ft export ADAPTER --scale SCALE --format peft"


class FoundScale(NamedTuple):
    """The scale, and what has to be said about it. `problem`: why there is none."""

    value: float = 1.0
    notice: str | None = None
    problem: str | None = None


def find_scale(document: Mapping[str, Any] | None, given: float | None) -> FoundScale:
    """The scale that a configuration (None: there is none) leads to; `given` is what a person says it was."""
    if document is None:
        return _without_configuration(given)
    parameters = document["lora_parameters"]
    scale = parameters.get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        return _missing(parameters, given)
    alpha, rank = parameters.get("alpha"), parameters.get("rank")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or alpha == rank:
        return _as_given(float(scale), given)
    if "fine_tune_type" in document or "num_layers" in document:
        found = _as_given(float(scale), given)
        text = f"lora_parameters: scale = {scale:g} counts, and alpha = {alpha:g} has no effect, as in mlx-lm."
        return found if found.problem else found._replace(notice=text)
    return _ambiguous(float(scale), float(scale) * alpha / rank, given)


def _without_configuration(given: float | None) -> FoundScale:
    if given is not None:
        return FoundScale(given)
    text = f"There is no adapter_config.json, so the scale is taken to be {DEFAULT_SCALE:g}, the default of that time."
    return FoundScale(DEFAULT_SCALE, notice=text)


def _missing(parameters: Mapping[str, Any], given: float | None) -> FoundScale:
    if given is not None:
        return FoundScale(given)
    return FoundScale(problem=f"lora_parameters.scale = {parameters.get('scale')!r} is not a number. {_HOW}")


def _as_given(scale: float, given: float | None) -> FoundScale:
    if given is None or given == scale:
        return FoundScale(scale)
    return FoundScale(problem=f"lora_parameters.scale = {scale:g}, and --scale {given:g} says otherwise")


def _ambiguous(scale: float, with_alpha: float, given: float | None) -> FoundScale:
    if given is not None:
        return FoundScale(given)
    return FoundScale(
        problem="lora_parameters has scale and alpha, and the file does not say when it was trained: until June 2024 "
        f"mlx-lm multiplied by {with_alpha:g} (scale x alpha / rank), since then by {scale:g} (scale alone). {_HOW}"
    )

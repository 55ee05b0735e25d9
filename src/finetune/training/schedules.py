"""Learning rates as pure functions: step -> value. Steps count from 0; the values are absolute, not factors."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

Schedule: TypeAlias = Callable[[int], float]


def constant(peak: float, *, warmup_steps: int = 0) -> Schedule:
    """Linear from 0 to `peak` over `warmup_steps`, and `peak` after them.

    The first step (0) already learns: it gets peak / warmup_steps.
    """

    def at(step: int) -> float:
        return _warm_up(peak, step, warmup_steps) if step < warmup_steps else peak

    return at


def linear(peak: float, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> Schedule:
    """Linear warm-up to `peak`, then a straight line to `floor` at `total_steps`, and `floor` after it."""

    def at(step: int) -> float:
        if step < warmup_steps:
            return _warm_up(peak, step, warmup_steps)
        return peak + (floor - peak) * _progress(step, warmup_steps, total_steps)

    return at


def cosine(peak: float, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> Schedule:
    """Linear warm-up to `peak`, then a half cosine to `floor` at `total_steps`, and `floor` after it.

    Loshchilov and Hutter 2017 (SGDR), without restarts.
    """

    def at(step: int) -> float:
        if step < warmup_steps:
            return _warm_up(peak, step, warmup_steps)
        progress = _progress(step, warmup_steps, total_steps)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return at


def make_schedule(
    name: Literal["constant", "linear", "cosine"],
    peak: float,
    *,
    warmup_steps: int,
    total_steps: int,
    floor: float = 0.0,
) -> Schedule:
    """The schedule of a configuration. A constant rate has no floor to fall to."""
    match name:
        case "constant":
            return constant(peak, warmup_steps=warmup_steps)
        case "linear":
            return linear(peak, warmup_steps=warmup_steps, total_steps=total_steps, floor=floor)
        case "cosine":
            return cosine(peak, warmup_steps=warmup_steps, total_steps=total_steps, floor=floor)


def _warm_up(peak: float, step: int, warmup_steps: int) -> float:
    return peak * (step + 1) / warmup_steps


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the way from the end of the warm-up to the end of the run, in [0, 1]."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))

"""One rank and one scale for all modules, which is all that mlx-lm's format has room for, and the way back.

A smaller rank is filled up with zeros, which adds nothing to the update. Another scale goes into B: B' = B s_m / s.
Where s_m / s is a power of two no bit is lost; elsewhere B' is rounded once to float32 (relative error 2^-24).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate
from finetune.core.types import FloatArray


@dataclass(frozen=True, slots=True)
class Uniform:
    """Updates of one rank that are all multiplied by the same scale."""

    updates: Mapping[str, LoraUpdate]
    rank: int
    scale: float
    rounded: tuple[str, ...] = ()  # modules whose B was rounded


def made_uniform(adapter: Adapter) -> Uniform:
    """The widest rank for all, and the scale that most modules have."""
    scales = {module: adapter.scale(module) for module in adapter.updates}
    counts = Counter(scales.values())
    scale = max(counts, key=lambda value: (counts[value], value))
    rank = max(update.rank for update in adapter.updates.values())
    updates, rounded = {}, []
    for module, update in adapter.updates.items():
        b = _times(update.b, _ratio(scales[module], scale))
        if not np.array_equal(_times(b, _ratio(scale, scales[module])), update.b):
            rounded.append(module)
        more = rank - update.rank
        updates[module] = update._replace(a=np.pad(update.a, ((0, more), (0, 0))), b=np.pad(b, ((0, 0), (0, more))))
    return Uniform(updates, rank, scale, tuple(rounded))


def taken_apart(uniform: Uniform, config: AdapterConfig) -> Adapter | None:
    """The adapter of this configuration from which `made_uniform` made these updates; None where it did not."""
    updates = {}
    for module, update in uniform.updates.items():
        rank = config.rank_of(module)
        b = _times(update.b[:, :rank], _ratio(uniform.scale, config.scale(module, rank)))
        updates[module] = update._replace(a=np.ascontiguousarray(update.a[:rank]), b=np.ascontiguousarray(b))
    adapter = Adapter(config, updates)
    again = made_uniform(adapter)
    same = (again.rank, again.scale) == (uniform.rank, uniform.scale)
    return (
        adapter if same and all(_equal(again.updates[module], uniform.updates[module]) for module in updates) else None
    )


def _ratio(numerator: float, denominator: float) -> float:
    """Equal scales, which may be zero, have the ratio 1."""
    return 1.0 if numerator == denominator else numerator / denominator


def _times(b: FloatArray, ratio: float) -> FloatArray:
    """Multiplied in double precision, rounded once."""
    return b if ratio == 1.0 else (b.astype(np.float64) * ratio).astype(np.float32)


def _equal(left: LoraUpdate, right: LoraUpdate) -> bool:
    return np.array_equal(left.a, right.a) and np.array_equal(left.b, right.b)

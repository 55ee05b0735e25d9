"""Adapters to write and to read back."""

from typing import Any

import numpy as np

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
IN, OUT = 6, 8


def update(rank: int, seed: int, *, dora: bool = False) -> LoraUpdate:
    rng = np.random.default_rng(seed)
    magnitude = np.abs(rng.normal(size=OUT)).astype(np.float32) if dora else None
    return LoraUpdate(
        rng.normal(size=(rank, IN)).astype(np.float32), rng.normal(size=(OUT, rank)).astype(np.float32), magnitude
    )


def plain_adapter(*, ranks: tuple[int, int] = (4, 4), dora: bool = False, **config: Any) -> Adapter:
    """Two modules with these ranks; the first rank is the configuration's."""
    values = {
        "rank": ranks[0],
        "alpha": 8.0,
        "target_modules": ("q_proj", "up_proj"),
        "base_model": "base",
        "use_dora": dora,
        "rank_pattern": {MODULES[1]: ranks[1]} if ranks[1] != ranks[0] else {},
        **config,
    }
    found = {
        module: update(rank, number, dora=dora)
        for number, (module, rank) in enumerate(zip(MODULES, ranks, strict=True))
    }
    return Adapter(AdapterConfig(**values), found)


def dora_adapter(**config: Any) -> Adapter:
    return plain_adapter(dora=True, **config)


def same_updates(left: Adapter, right: Adapter) -> None:
    """Every tensor bit for bit, and every scale exactly."""
    assert left.updates.keys() == right.updates.keys()
    for module, expected in right.updates.items():
        found = left.updates[module]
        np.testing.assert_array_equal(found.a, expected.a)
        np.testing.assert_array_equal(found.b, expected.b)
        assert (found.magnitude is None) == (expected.magnitude is None)
        if found.magnitude is not None:
            np.testing.assert_array_equal(found.magnitude, expected.magnitude)
        assert left.scale(module) == right.scale(module)

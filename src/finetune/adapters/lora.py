"""What a LoRA adapter is, independent of any engine: its scale and its starting point."""

import hashlib
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from finetune.core.types import FloatArray

AdapterInit: TypeAlias = Callable[[str, int, int], FloatArray]
"""(module name, rank, in_features) -> lora_A of shape [rank, in_features]. lora_B always starts at zero."""


def seeded_init(seed: int) -> AdapterInit:
    """Draw lora_A as PEFT does: uniform in +-1/sqrt(in_features) (Kaiming, a = sqrt 5).

    The stream depends on the seed and the module's name alone, so that every engine starts from the same
    point, whatever the order in which it visits the modules.
    """

    def draw(module: str, rank: int, in_features: int) -> FloatArray:
        digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        bound = 1.0 / math.sqrt(in_features)
        return rng.uniform(-bound, bound, size=(rank, in_features)).astype(np.float32)

    return draw


def lora_scale(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def alpha_for(scale: float, rank: int) -> float:
    """The alpha whose alpha / rank is `scale`: exactly where such a float exists, else to its last bit."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scale), alpha)

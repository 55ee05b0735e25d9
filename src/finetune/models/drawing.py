"""New weights for a model that starts from its config.json alone, the same for every engine."""

import hashlib

import numpy as np

from finetune.core.errors import ModelError
from finetune.core.types import FloatArray

_BODIES = ("model.", "transformer.")  # what libraries put before the names of the body's weights


def draw_weight(name: str, shape: tuple[int, ...], model_type: str, std: float, seed: int) -> FloatArray:
    """A matrix is normal(0, std), a norm 1 (gemma stores an offset from 1: 0), a bias 0.

    Each weight has its own stream, derived from the seed and its name in the body: the order in which an engine
    visits the weights has no influence. Raises ModelError for a weight that is none of these.
    """
    if len(shape) >= 2:
        return _stream(seed, name).standard_normal(shape, dtype=np.float32) * np.float32(std)
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in {"weight", "bias"}:
        raise ModelError(f"init: random does not know how to draw {name} of a {model_type} model.")
    is_norm = leaf == "weight" and not model_type.startswith("gemma")
    return np.full(shape, 1.0 if is_norm else 0.0, np.float32)


def _stream(seed: int, name: str) -> np.random.Generator:
    for body in _BODIES:
        name = name.removeprefix(body)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))

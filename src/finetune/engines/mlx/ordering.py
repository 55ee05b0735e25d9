"""In which order MLX computes gradients.

Nothing in a step waits for the gradient of a weight, so MLX computes it last and keeps until then what it needs.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


def weights_first(x: Any, *weights: Any) -> Sequence[Any]:
    """The arrays as they are; the gradient of x comes after those of the weights."""
    arrays: Any = _as_they_are(x, *weights)
    return list(arrays)


@mx.custom_function
def _as_they_are(*arrays: Any) -> tuple[Any, ...]:
    return arrays


@_as_they_are.vjp
def _after_the_weights(primals: Sequence[Any], cotangents: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
    gradient, *others = cotangents
    return (mx.depends([gradient], others)[0], *others)

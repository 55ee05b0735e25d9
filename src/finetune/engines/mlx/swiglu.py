"""silu(gate) * up with the gradient that goes with it, in a few loops over the elements.

MLX keeps sigmoid(gate), silu(gate) and both inputs for the gradient, and computes each factor in a loop of its own.
Here only the inputs are kept: with s = sigmoid(gate),

    d/d gate = up s (1 + gate (1 - s))        d/d up = gate s
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from finetune.engines.mlx.exponential import compiled, in_two_loops, pays, times
from finetune.engines.mlx.untraced import untraced


def swiglu(gate: Any, up: Any, *, otherwise: Callable[[Any, Any], Any]) -> Any:
    """silu(gate) * up for arrays of one shape, element by element, or by mlx-lm's function where that is as fast."""
    return _swiglu(gate, up) if pays(gate) and up.dtype == gate.dtype else otherwise(gate, up)


@mx.custom_function
@untraced
def _swiglu(gate: Any, up: Any) -> Any:
    return in_two_loops(-gate, _gated, gate, up)


@_swiglu.vjp
@untraced
def _gradient(primals: Any, cotangent: Any, output: Any) -> tuple[Any, Any]:
    gate, up = primals
    sigmoid = in_two_loops(-gate, _sigmoid)
    flat = [array.reshape(-1) for array in (gate, up, sigmoid, cotangent)]
    gradients = compiled(_gradients, gate.size)(*flat)
    return gradients[0].reshape(gate.shape), gradients[1].reshape(up.shape)


def _gated(r: Any, power: Any, gate: Any, up: Any) -> Any:
    return gate * up / (1.0 + times(r, power))


def _sigmoid(r: Any, power: Any) -> Any:
    return 1.0 / (1.0 + times(r, power))


def _gradients(gate: Any, up: Any, sigmoid: Any, cotangent: Any) -> tuple[Any, Any]:
    scaled = cotangent * sigmoid
    return scaled * up * (1.0 + gate * (1.0 - sigmoid)), scaled * gate

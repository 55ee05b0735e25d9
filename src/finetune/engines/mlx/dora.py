"""DoRA (Liu et al. 2024): the weight's rows keep a trained length m, and LoRA changes their direction.

    y = (m / n) * (W x + s B A x),    n_i = |(W + s B A)_i|

n is a constant in the gradient (section 4.3 of the paper). Its square is

    n_i^2 = |W_i|^2 + 2 s (W A^T B^T)_ii + s^2 (B A A^T B^T)_ii

so that a step needs W A^T [out, rank], and never W + s B A [out, in]; |W_i|^2 is computed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from finetune.engines.mlx.ordering import weights_first
from finetune.engines.mlx.quantize import dense, product

_SMALLEST = 1e-12  # of |W_i|^2: what rounding leaves of a row that the update cancels


@dataclass(frozen=True, slots=True)
class RowNorms:
    """Lengths of the rows of frozen weights, with and without an update. Modules go by the adapter's names."""

    layers: Mapping[str, Any]
    squares: Mapping[str, Any]  # |W_i|^2, [out] float32

    def initial(self, module: str) -> Any:
        """|W_i|, where a magnitude starts."""
        return mx.sqrt(self.squares[module])

    def updated(self, module: str, a: Any, b: Any, scale: float) -> Any:
        """n [out] of a module with the update scale * b a, as a constant."""
        layer, square = self.layers[module], self.squares[module]
        a, b = mx.stop_gradient(a), mx.stop_gradient(b)
        projected = product(layer, a.astype(_products(layer))).astype(mx.float32)  # (W A^T)^T
        cross = (projected.T * b).sum(axis=1)
        own = ((b @ (a @ a.T)) * b).sum(axis=1)
        return mx.sqrt(mx.maximum(square + 2.0 * scale * cross + scale * scale * own, _SMALLEST * square))


def row_norms(layers: Mapping[str, Any]) -> RowNorms:
    """Measure the rows of each layer, one layer in memory at a time."""
    squares = {}
    for module, layer in layers.items():
        squares[module] = mx.square(dense(layer, mx.float32)).sum(axis=1)
        mx.eval(squares[module])
    return RowNorms(layers, squares)


def scale_rows(z: Any, magnitude: Any, norms: Any) -> Any:
    """(m / n) z of z = W x + s B A x; added as a difference to z, which 16 bits hold more finely than m / n.

    Where both W and B have zeros for a row, z is left as it is, so that B can leave zero.
    """
    z, magnitude = weights_first(z, magnitude)
    return z + z * ratio_less_one(magnitude, norms).astype(z.dtype)


def ratio_less_one(magnitude: Any, norms: Any) -> Any:
    """m / n - 1 of each row of a weight, [out]; 0 where n is."""
    zero = norms == 0
    return mx.where(zero, 1.0, magnitude / mx.where(zero, 1.0, norms)) - 1.0


def _products(layer: Any) -> Any:
    """The type of a layer's products."""
    return layer.scales.dtype if "scales" in layer else layer.weight.dtype

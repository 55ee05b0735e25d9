"""DoRA (Liu et al. 2024): the weight's rows keep a trained length m, and LoRA changes their direction.

    y = (m / n) * (W x + s B A x) + bias,    n_i = |(W + s B A)_i|

n is a constant in the gradient (section 4.3 of the paper). Its square is

    n_i^2 = |W_i|^2 + 2 s (W A^T B^T)_ii + s^2 (B A A^T B^T)_ii

so that a step needs W A^T [out, rank], and never W + s B A [out, in]; |W_i|^2 is computed once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from finetune.engines.torch.frozen import FrozenWeight

_SMALLEST = 1e-12  # of |W_i|^2: what rounding leaves of a row that the update cancels
_FAINT = 2.0**-10  # a smaller m / n leaves too little of a row's output to divide by


class RowScale(NamedTuple):
    """m / n of one module with one update."""

    excess: Tensor  # [out] float32: m / n - 1, which keeps its digits in 16 bits where m / n would not
    norms: Tensor  # [out] float32: n, at least the smallest number that is not zero
    faint: Tensor | None  # rows whose m / n is close to zero, or zero by zero


class _Known(NamedTuple):
    state: tuple[Any, ...]
    b: Tensor
    magnitude: Tensor
    found: RowScale


class RowScales:
    """The lengths of the rows of one frozen weight, alone and with updates.

    n is computed again only when A, B or m has changed since the last call with them: adapters that do not change
    cost nothing from the second call on.
    """

    def __init__(self, weight: FrozenWeight) -> None:
        self._weight = weight
        self._squares: Tensor | None = None
        self._known = WeakTensorKeyDictionary()

    @property
    def squares(self) -> Tensor:
        """|W_i|^2, [out] float32."""
        if self._squares is None:
            self._squares = torch.linalg.vector_norm(self._weight.dense(torch.float32), dim=1).square_()
        return self._squares

    def initial(self) -> Tensor:
        """|W_i|, [out] float32: where a magnitude starts."""
        return self.squares.sqrt()

    def of(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor, dtype: torch.dtype) -> RowScale:
        """m / n with the update `scale` B A, for products in `dtype`."""
        state = (a._version, b._version, magnitude._version, scale, dtype)
        known: _Known | None = self._known.get(a)  # type: ignore[no-untyped-call]
        if known is None or known.state != state or known.b is not b or known.magnitude is not magnitude:
            with torch.no_grad():
                found = _row_scale(magnitude, self._updated(a, b, scale, dtype))
            self._known[a] = known = _Known(state, b, magnitude, found)
        return known.found

    def _updated(self, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """n [out]."""
        projected = (self._weight.dense(dtype) @ a.to(dtype).T).float()
        cross = (projected * b).sum(dim=1)
        own = ((b @ (a @ a.T)) * b).sum(dim=1)
        squares = self.squares + 2.0 * scale * cross + scale * scale * own
        return torch.maximum(squares, _SMALLEST * self.squares).sqrt_()


def _row_scale(magnitude: Tensor, norms: Tensor) -> RowScale:
    """Where both W and B have zeros for a row, its scale is 1, so that B can leave zero."""
    ratio = torch.where(norms > 0, magnitude / norms, 1.0)
    faint = ((ratio.abs() < _FAINT) | (norms == 0)).nonzero().squeeze(1)
    tiny = torch.finfo(torch.float32).tiny
    return RowScale(ratio - 1.0, norms.clamp(min=tiny), faint if len(faint) else None)


def scale_rows(z: Tensor, magnitude: Tensor, scale: RowScale, bias: Tensor | None) -> Tensor:
    """(m / n) z + bias of z = W x + s B A x [N, out], which is overwritten."""
    y: Tensor = _ScaledRows.apply(z, magnitude, scale)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _ScaledRows(torch.autograd.Function):
    """(m / n) z, in the memory of z: what the next operation keeps serves both.

    dL/dm = sum over tokens of dy z / n, which is dy y / m. Only where m is about zero is z itself kept.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, scale: RowScale) -> Tensor:
        """z [N, out] -> [N, out]."""
        faint = None if scale.faint is None else z[:, scale.faint]
        y = z.addcmul_(z, scale.excess.to(z.dtype))
        ctx.mark_dirty(z)
        ctx.save_for_backward(y, magnitude, faint)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        y, magnitude, faint = ctx.saved_tensors
        scale: RowScale = ctx.scale
        work = gradient * y
        into_magnitude = work.sum(dim=0, dtype=torch.float32) / magnitude
        if faint is not None:
            sums = (gradient[:, scale.faint] * faint).sum(dim=0, dtype=torch.float32)
            into_magnitude[scale.faint] = sums / scale.norms[scale.faint]
        excess = scale.excess.to(gradient.dtype)
        return torch.addcmul(gradient, gradient, excess, out=work), into_magnitude, None

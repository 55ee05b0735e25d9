"""Parts of transformers' models with a backward pass of their own that keeps less and takes fewer passes.

A part is replaced on the instance, and only where it gives the module's own results; any other stays as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Norm(NamedTuple):
    """y = x / rms(x) * (weight + offset), the factor applied before or after rounding to the type of x."""

    epsilon: float
    offset: float
    rounds_first: bool


def fuse(model: nn.Module) -> None:
    """Replace the RMS norms of `model` (Zhang and Sennrich 2019) whose weights are frozen."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _fuse_norm(module)


def _fuse_norm(module: Any) -> None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float) or getattr(module, "weight", None) is None:
        return
    for norm in (Norm(epsilon, 0.0, True), Norm(epsilon, 1.0, False)):
        if _reproduces(module, norm):
            module.forward = _forward(module, module.forward, norm)
            return


def _forward(module: Any, original: Callable[[Tensor], Tensor], norm: Norm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight: Tensor = module.weight
        if weight.requires_grad:
            return original(x)
        if not torch.is_grad_enabled():  # a tenth of a token's time goes into the bookkeeping of a small function
            return _normed(x, weight, norm)[0]
        result: Tensor = _RMSNorm.apply(x, weight, norm)  # type: ignore[no-untyped-call]
        return result

    return forward


@torch.no_grad()
def _reproduces(module: Any, norm: Norm) -> bool:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator).to(weight.device, weight.dtype)
    tolerance = 4 * torch.finfo(x.dtype).eps
    found: Tensor = _RMSNorm.apply(x, weight, norm)  # type: ignore[no-untyped-call]
    return torch.allclose(found, module(x), rtol=tolerance, atol=tolerance)


class _RMSNorm(torch.autograd.Function):
    """Keeps x in its own type and one number a row, where autograd would keep two float32 copies of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        """x [..., D] -> [..., D]."""
        y, inverse = _normed(x, weight, norm)
        ctx.save_for_backward(x, inverse, weight)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        into_normed = _floats(gradient).mul_(weight.float() + ctx.norm.offset)
        normed = _floats(x).mul_(inverse)
        along = (into_normed * normed).mean(dim=-1, keepdim=True)
        return into_normed.addcmul_(normed, along, value=-1.0).mul_(inverse).to(x.dtype), None, None


def _normed(x: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """y [..., D], and 1 / rms(x) [..., 1]."""
    values = _floats(x)
    size = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    inverse = torch.rsqrt(size.square_().div_(x.shape[-1]).add_(norm.epsilon))
    normed = values.mul_(inverse)
    if norm.rounds_first:
        return normed.to(x.dtype).mul_(weight), inverse
    return normed.mul_(weight.float() + norm.offset).to(x.dtype), inverse


def _floats(x: Tensor) -> Tensor:
    """A float32 copy: products of two types are computed without vector instructions."""
    return x.to(torch.float32, copy=True)

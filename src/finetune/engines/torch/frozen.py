"""Weights of linear modules that are read and never trained, whatever they are stored as."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from finetune.engines.torch.ordered import OrderedLinear
from finetune.engines.torch.quantize import QuantizedLinear


class FrozenWeight(Protocol):
    """The matrix of a linear module."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in]. Made anew on each call where it is stored in another form, so that nothing dense is kept."""
        ...

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias of x [N, in]: [N, out]. Without a gradient of its own."""
        return linear(x, self.dense(x.dtype), bias)


class DenseWeight(FrozenWeight):
    """The weight of an `nn.Linear`."""

    def __init__(self, module: nn.Linear) -> None:
        self._weight = module.weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._weight.detach().to(dtype)


class TransposedWeight(FrozenWeight):
    """The weight of GPT-2's `Conv1D`, which is stored [in, out]."""

    def __init__(self, module: Conv1D) -> None:
        self._weight = module.weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        stored: Tensor = self._weight.detach().to(dtype)
        return stored.T


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """How the matrix of a linear module is read."""
    if isinstance(module, QuantizedLinear | OrderedLinear):
        return module
    if isinstance(module, Conv1D):
        return TransposedWeight(module)
    if isinstance(module, nn.Linear):
        return DenseWeight(module)
    raise TypeError(f"{type(module).__name__} is not a linear module")


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module; None for any other."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear | QuantizedLinear | OrderedLinear):
        return module.in_features, module.out_features
    return None

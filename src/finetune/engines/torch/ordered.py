"""Linear modules for inference on a CPU: their weights lie in the order in which oneDNN multiplies them.

A product with few rows spends its time on rearranging the weight, which is done once here. The values are the same,
and what a row comes to does not depend on the rows beside it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from finetune.engines.torch import compat
from finetune.engines.torch.device import free_memory
from finetune.engines.torch.head import SplitModel
from finetune.engines.torch.loading import BaseModel

_ROOM = 8  # a head that shares the embedding's weight is copied where so many times its size are free


class OrderedLinear(nn.Module):
    """Stands in for an `nn.Linear` or GPT-2's `Conv1D`; a `FrozenWeight`."""

    def __init__(self, module: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = module.weight.detach()
        dense: Tensor = weight.T if isinstance(module, Conv1D) else weight
        self.out_features, self.in_features = dense.shape
        self.bias = module.bias
        self.weight = compat.in_onednn_order(dense.contiguous())  # no parameter: it is neither moved nor saved

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], made anew on each call."""
        return self.weight.to_dense().to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias of x [N, in]: [N, out]."""
        rows = len(x)
        filled = pad(x, (0, 0, 0, padded_rows(rows) - rows)) if padded_rows(rows) > rows else x
        return compat.onednn_product(filled, self.weight, bias)[:rows]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.product(x.reshape(-1, self.in_features), self.bias).view(*x.shape[:-1], self.out_features)


def padded_rows(rows: int) -> int:
    """The rows that a product of `rows` has: at most an eighth more, of 8 sizes between a number and its double.

    oneDNN compiles a product for each number of rows, in about half a millisecond, and keeps it.
    """
    step = max(1, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def in_order(base: BaseModel) -> BaseModel:
    """The model with its linear modules replaced where this machine gains from it; `base` is used up."""
    if base.device.type != "cpu" or not compat.has_onednn(base.dtype):
        return base
    shared = {id(module.weight) for module in base.model.modules() if isinstance(module, nn.Embedding)}
    paths = [
        path
        for path, module in base.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in shared
    ]
    for path in paths:  # one after the other, so that the peak is the model and one weight
        base.model.set_submodule(path, OrderedLinear(base.model.get_submodule(path)))
    return replace(base, split=_with_ordered_head(base))


def _with_ordered_head(base: BaseModel) -> SplitModel:
    """A head that shares the embedding's weight stays in the model as it is, and has a copy beside it."""
    head = base.split.head
    if not head.path:
        return base.split
    module = base.model.get_submodule(head.path)
    if isinstance(module, nn.Linear) and free_memory(base.device) > _ROOM * module.weight.nbytes:
        module = OrderedLinear(module)
    return replace(base.split, head=replace(head, module=module))

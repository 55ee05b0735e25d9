"""Frozen linear modules in 4 or 8 bits (QLoRA, Dettmers et al. 2023): quantised while they are read from the files.

The linear modules of the layers are quantised; embeddings, norms and the head stay as they are. The packed matrix is
unpacked for each product and again in the backward pass, which costs a few per cent of a product with a few hundred
rows; nothing dense is kept. The packed values are a function of the file alone.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from finetune.engines.torch.nf4 import NF4_PARTS, Nf4Matrix

Quantization: TypeAlias = Literal["4bit", "8bit"]
INT8_PARTS = ("codes", "scales")
_CHUNK_ROWS = 1024
_LARGEST = 127


class Int8Matrix(nn.Module):
    """A matrix [rows, columns] in 8 bits: round(W / scale) with one scale for each row.

    A scale is a bfloat16 number, rounded up: a product of code and scale is exact in float32, and rounded once in a
    product of bfloat16, so that all types read the same matrix.
    """

    codes: Tensor  # [rows, columns] int8
    scales: Tensor  # [rows, 1] bfloat16

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @classmethod
    def pack(cls, matrix: Tensor) -> Self:
        """The nearest codes and scales."""
        codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        largest = matrix.abs().amax(dim=1, keepdim=True).float()
        scales = (largest / _LARGEST * (1 + 2**-8)).to(torch.bfloat16)  # never less than largest / 127
        scales[scales == 0] = 1.0
        for start in range(0, len(matrix), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            codes[rows] = (matrix[rows].float() / scales[rows].float()).round_()
        return cls(codes, scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the codes stand for, made anew on each call."""
        exact = torch.float32 if dtype == torch.float16 else dtype  # scales may be too small for float16
        return self.codes.to(exact).mul_(self.scales.to(exact)).to(dtype)


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear` or GPT-2's `Conv1D`; a `FrozenWeight`. `store` gives it its values."""

    matrix: Nf4Matrix | Int8Matrix

    def __init__(self, module: nn.Linear | Conv1D, quantization: Quantization) -> None:
        super().__init__()
        self._transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        self.out_features, self.in_features = (columns, rows) if self._transposed else (rows, columns)
        self.bias = module.bias
        self._quantization = quantization

    def store(self, weight: Tensor) -> None:
        """Take the values of the module's weight as the files hold it, in their type."""
        matrix = weight.T.contiguous() if self._transposed else weight
        self.matrix = (Nf4Matrix if self._quantization == "4bit" else Int8Matrix).pack(matrix)

    @property
    def parts(self) -> Sequence[str]:
        """The names of the tensors that hold its values."""
        return NF4_PARTS if self._quantization == "4bit" else INT8_PARTS

    def restore(self, parts: Mapping[str, Tensor]) -> None:
        """Take the values that `store` came to, from the tensors of an earlier `matrix`."""
        shape = (self.out_features, self.in_features)
        self.matrix = Nf4Matrix(shape, parts) if self._quantization == "4bit" else Int8Matrix(**parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in]."""
        return self.matrix.dense(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias of x [N, in]: [N, out]."""
        return linear(x, self.dense(x.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = _FrozenProduct.apply(x, self.matrix)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _FrozenProduct(torch.autograd.Function):
    """x W^T that keeps nothing: W is unpacked again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Nf4Matrix | Int8Matrix) -> Tensor:
        """x [..., in] -> [..., out]."""
        ctx.matrix = matrix
        return linear(x, matrix.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.matrix.dense(gradient.dtype), None


def quantize_linears(model: Any, quantization: Quantization) -> None:
    """Put quantised modules, still without values, in the place of all linear modules but the head."""
    head = model.get_output_embeddings()
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for path, module in found:
        if module is not head:
            model.set_submodule(path, QuantizedLinear(module, quantization))


def is_quantized(model: nn.Module) -> bool:
    """True where some linear module is quantised."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def quantization_problems(quantization: str | None) -> list[str]:
    """Why this machine cannot quantise like that, before anything is loaded."""
    if quantization != "4bit" or find_spec("bitsandbytes"):
        return []
    return [
        f"model.quantization={quantization}: the PyTorch engine needs bitsandbytes, which is not installed. "
        "Install finetune[torch], or use model.quantization=8bit."
    ]

"""Matrices in 4 bits: NormalFloat (Dettmers et al. 2023) in blocks of 64, through bitsandbytes' functions.

The largest absolute value of each block is stored in 8 bits itself (double quantisation, section 3 of the paper):
4.13 bits a weight in place of 4.5. Everything that depends on the version of bitsandbytes is in this file.
"""

import functools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

NF4_PARTS = ("codes", "scale_codes", "scale_scales", "offset")
_BLOCK = 64
_SCALES_BLOCK = 256
_CHUNK_BLOCKS = 2**12  # quantised at once: the working copies are several times as large


@functools.cache
def _functions() -> Any:
    with _without_remote_kernels():
        from bitsandbytes import functional
    return functional


@contextmanager
def _without_remote_kernels() -> Iterator[None]:
    """bitsandbytes would fetch compiled code from the hub where `kernels` is installed, and warn where it is not."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, loaded = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if loaded is not None:
            sys.modules["kernels"] = loaded


class Nf4Matrix(nn.Module):
    """A matrix of any shape in blocks of its values, row after row; the last block is filled up with zeros.

    bitsandbytes' CPU kernel mixes up blocks that cross the end of a row, so it sees one row for each block.
    """

    codes: Tensor  # two values a byte
    scale_codes: Tensor  # [blocks] uint8
    scale_scales: Tensor  # float32, one for 256 blocks
    offset: Tensor  # float32, what the scales of the blocks are stored as a distance from

    def __init__(self, shape: Sequence[int], parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        for name in NF4_PARTS:
            self.register_buffer(name, parts[name], persistent=False)

    @classmethod
    def pack(cls, matrix: Tensor) -> Self:
        """The nearest codes and scales."""
        blocks = -(-matrix.numel() // _BLOCK)
        codes = torch.empty((blocks * _BLOCK // 2, 1), dtype=torch.uint8, device=matrix.device)
        scales = torch.empty(blocks, device=matrix.device)
        _quantize_into(codes, scales, matrix.reshape(-1))
        offset = scales.median()  # unlike the mean, it does not depend on the order of a sum
        scale_codes, state = _functions().quantize_blockwise(scales - offset, blocksize=_SCALES_BLOCK)
        parts = (codes, scale_codes, state.absmax, offset)
        return cls(matrix.shape, dict(zip(NF4_PARTS, parts, strict=True)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the codes stand for, made anew on each call."""
        functions = _functions()
        scales = functions.dequantize_blockwise(
            self.scale_codes, absmax=self.scale_scales, code=_dynamic_map(self.codes.device), blocksize=_SCALES_BLOCK
        )
        blocks = torch.Size((self.scale_codes.numel(), _BLOCK))
        state = functions.QuantState(
            scales.add_(self.offset), shape=blocks, blocksize=_BLOCK, quant_type="nf4", dtype=dtype
        )
        values: Tensor = functions.dequantize_4bit(self.codes, state)
        return values.view(-1)[: math.prod(self.shape)].view(self.shape)


def _quantize_into(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Fill `codes` and `scales` [blocks], a few blocks at a time."""
    for first in range(0, len(scales), _CHUNK_BLOCKS):
        chunk = values[first * _BLOCK : (first + _CHUNK_BLOCKS) * _BLOCK]
        if len(chunk) % _BLOCK:
            chunk = pad(chunk, (0, -len(chunk) % _BLOCK))
        packed, state = _functions().quantize_4bit(chunk.view(-1, _BLOCK), blocksize=_BLOCK, quant_type="nf4")
        codes[first * _BLOCK // 2 :][: len(packed)] = packed
        scales[first:][: len(state.absmax)] = state.absmax


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    code: Tensor = _functions().create_dynamic_map()
    return code.to(device)

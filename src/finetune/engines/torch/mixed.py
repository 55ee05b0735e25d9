"""Several adapters in one call: each token takes one of them, or none.

The updates of all adapters to one module lie side by side as one of the sum of their ranks, so that a call costs two
products more than the base's, however many adapters it has:

    y = W x + B (share * A x) + bias,    share [N, ranks] is 1 in the rows of a token's own adapter, else 0

and with DoRA the first two terms times the m / n of the token's adapter.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from finetune.engines.torch.lora import LoRALinear, LoraWeights


class _Stack(NamedTuple):
    """One module's updates by all adapters, in the type of the activations."""

    a: Tensor  # [ranks, in]
    b: Tensor  # [ranks, out], times the scale
    ranks: tuple[int, ...]  # of each adapter; 0 where it has no update for the module
    excess: Tensor | None  # [adapters + 1, out]: m / n - 1 of DoRA; the base is the last, with zeros


class MixedUpdates:
    """The adapters of a call. They are stacked once for as long as the same ones take part."""

    def __init__(self, adapters: Sequence[Mapping[str, LoraWeights]]) -> None:
        self._adapters = adapters
        self._stacks: dict[str, _Stack | None] = {}
        self._numbers: list[int] = []
        self._index = torch.empty(0)
        self._shares: dict[tuple[int, ...], Tensor | None] = {}

    def assign(self, numbers: list[int], device: torch.device) -> None:
        """Say which adapter each token of the next call takes, by its place; after the last one comes the base."""
        if numbers != self._numbers:
            self._numbers = numbers
            self._index = torch.tensor(numbers, device=device)
            self._shares.clear()

    def product(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""
        stack = self._stack(layer, x.dtype)
        if stack is None:
            plain: Tensor = layer.base(x)
            return plain
        bias = layer.bias
        y = layer.weight.product(x, bias if stack.excess is None else None)
        low = linear(x, stack.a)
        share = self._share(stack.ranks, x)
        y.addmm_(low if share is None else low.mul_(share), stack.b)
        if stack.excess is not None:
            y.addcmul_(y, stack.excess[self._index])
            if bias is not None:
                y += bias
        return y

    def _stack(self, layer: LoRALinear, dtype: torch.dtype) -> _Stack | None:
        if layer.path not in self._stacks:
            self._stacks[layer.path] = _stacked(layer, [adapter.get(layer.path) for adapter in self._adapters], dtype)
        return self._stacks[layer.path]

    def _share(self, ranks: tuple[int, ...], x: Tensor) -> Tensor | None:
        """[N, ranks]; None where there is one adapter, and all tokens take it."""
        if ranks not in self._shares:
            owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(x.device)
            alone = len(ranks) == 1 and not any(self._numbers)
            self._shares[ranks] = None if alone else (self._index[:, None] == owners).to(x.dtype)
        return self._shares[ranks]


def _stacked(layer: LoRALinear, updates: Sequence[LoraWeights | None], dtype: torch.dtype) -> _Stack | None:
    """The updates side by side; None where no adapter has one."""
    present = [update for update in updates if update is not None]
    if not present:
        return None
    a = torch.cat([update.a for update in present]).to(dtype)
    b = torch.cat([update.b * update.scale for update in present], dim=1).to(dtype).T.contiguous()
    ranks = tuple(0 if update is None else len(update.a) for update in updates)
    excess = None
    if any(update.magnitude is not None for update in present):
        excess = torch.stack([*(_excess(layer, update, b, dtype) for update in updates), torch.zeros_like(b[0])])
    return _Stack(a, b, ranks, excess)


def _excess(layer: LoRALinear, update: LoraWeights | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    if update is None or update.magnitude is None:
        return torch.zeros_like(like[0])
    return layer.row_scales.of(update.a, update.b, update.scale, update.magnitude, dtype).excess.to(dtype)

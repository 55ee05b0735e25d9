"""Several adapters in one batch: each row gets the update of its own, all rows in the same few products.

The A of all adapters lie side by side, so x A^T of every row with every adapter is one product; what does not belong
to a row is set to zero before the product with all B:

    y = W x + [s_1 B_1 ... s_k B_k] (keep * [A_1; ...; A_k] x)

Ranks may differ, and a row of the base keeps nothing. With magnitudes (DoRA) each row is scaled by its adapter's m / n.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from finetune.core.types import IntArray
from finetune.engines.mlx.dora import ratio_less_one
from finetune.engines.mlx.lora import LoraWeights


class StackedUpdates(NamedTuple):
    """The updates of one module by several adapters."""

    a: Any  # [in, R], R the sum of the ranks
    b: Any  # [R, out], times each adapter's scale
    owners: IntArray  # [R], the number of the adapter that a column of `a` belongs to
    ratios: Any | None  # [adapters + 1, out], m / n - 1 of DoRA and 0 of the others and of the base, which is last


class RowUpdates(NamedTuple):
    """What a LoRA layer adds to a batch of which each row has its own adapter."""

    stacked: StackedUpdates
    keep: Any | None  # [B, 1, R], True where the column belongs to the row's adapter; None: all belong to all rows
    ratios: Any | None  # [B, 1, out]

    def added(self, x: Any, y: Any) -> Any:
        """y [B x T, out] of the frozen weights with the rows' updates for x [B x T, in]."""
        low = x @ self.stacked.a.astype(x.dtype)
        if self.keep is not None:
            apart = low.reshape(len(self.keep), -1, low.shape[-1])
            low = mx.where(self.keep, apart, 0.0).astype(x.dtype).reshape(low.shape)
        y = mx.addmm(y, low, self.stacked.b.astype(x.dtype))
        if self.ratios is None:
            return y
        apart = y.reshape(len(self.ratios), -1, y.shape[-1])
        return (apart + apart * self.ratios.astype(y.dtype)).reshape(y.shape)


def by_itself(weights: Mapping[str, LoraWeights]) -> dict[str, StackedUpdates]:
    """A stack of one adapter."""
    return {module: _alone(update) for module, update in weights.items()}


def _alone(update: LoraWeights) -> StackedUpdates:
    a, b = mx.contiguous(update.a.T), mx.contiguous((update.b * update.scale).T)
    ratios = None
    if update.magnitude is not None:
        ratio = ratio_less_one(update.magnitude, update.norms)
        ratios = mx.stack([ratio, mx.zeros_like(ratio)])
    return StackedUpdates(a, b, np.zeros(len(b), np.int32), ratios)


def stack(adapters: Sequence[Mapping[str, StackedUpdates]]) -> dict[str, StackedUpdates]:
    """Adapters by themselves, side by side: their updates by module, which an adapter may leave out."""
    modules = {module: None for adapter in adapters for module in adapter}
    return {module: _stacked([adapter.get(module) for adapter in adapters]) for module in modules}


def _stacked(updates: Sequence[StackedUpdates | None]) -> StackedUpdates:
    present = [(number, update) for number, update in enumerate(updates) if update is not None]
    a = mx.concatenate([update.a for _, update in present], axis=1)
    b = mx.concatenate([update.b for _, update in present])
    owners = np.repeat([number for number, _ in present], [len(update.b) for _, update in present])
    return StackedUpdates(a, b, owners.astype(np.int32), _ratios(updates, b.shape[1]))


def _ratios(updates: Sequence[StackedUpdates | None], out: int) -> Any | None:
    found = [None if update is None else update.ratios for update in updates]
    if all(ratios is None for ratios in found):
        return None
    zero = mx.zeros(out)
    return mx.stack([*(zero if ratios is None else ratios[0] for ratios in found), zero])


def for_rows(stacked: Mapping[str, StackedUpdates], rows: IntArray) -> dict[str, RowUpdates]:
    """The updates of a batch; `rows` [B] has the number of each row's adapter in the stack, or -1 for the base."""
    masks: dict[bytes, Any | None] = {}
    updates = {}
    for module, update in stacked.items():
        key = update.owners.tobytes()
        if key not in masks:
            keep = update.owners[None, None] == rows[:, None, None]
            masks[key] = None if keep.all() else mx.array(keep)
        ratios = None if update.ratios is None else update.ratios[mx.array(rows)][:, None]
        updates[module] = RowUpdates(update, masks[key], ratios)
    return updates

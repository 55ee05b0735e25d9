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
        """y [B, T, out] of the frozen weights with the rows' updates for x [B, T, in]."""
        low = x @ self.stacked.a.astype(x.dtype)
        if self.keep is not None:
            low = mx.where(self.keep, low, 0.0).astype(x.dtype)
        y = y + low @ self.stacked.b.astype(x.dtype)
        return y if self.ratios is None else y + y * self.ratios.astype(y.dtype)


Weights = Mapping[str, LoraWeights]


def stack(adapters: Sequence[Weights]) -> dict[str, StackedUpdates]:
    """The updates of the adapters, by module; an adapter may leave modules out."""
    modules = {module: None for adapter in adapters for module in adapter}
    return {module: _stacked([adapter.get(module) for adapter in adapters]) for module in modules}


def _stacked(updates: Sequence[LoraWeights | None]) -> StackedUpdates:
    present = [(number, update) for number, update in enumerate(updates) if update is not None]
    a = mx.concatenate([update.a for _, update in present]).T
    b = mx.concatenate([update.b * update.scale for _, update in present], axis=1).T
    owners = np.repeat([number for number, _ in present], [update.a.shape[0] for _, update in present])
    return StackedUpdates(mx.contiguous(a), mx.contiguous(b), owners.astype(np.int32), _ratios(updates, b.shape[1]))


def _ratios(updates: Sequence[LoraWeights | None], out: int) -> Any | None:
    if not any(update is not None and update.magnitude is not None for update in updates):
        return None
    zero = mx.zeros(out)

    def row(update: LoraWeights | None) -> Any:
        if update is None or update.magnitude is None:
            return zero
        return ratio_less_one(update.magnitude, update.norms)

    return mx.stack([*map(row, updates), zero])


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

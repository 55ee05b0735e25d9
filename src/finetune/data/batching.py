"""From encoded rows to batches: which rows a step takes, and how they are cut and laid out.

The rows of a step are a pure function of (seed, step number), so the cursor of a checkpoint is that number.
Within a step rows are cut into micro-batches, padded side by side or packed end to end (`packing.py`); loss and
gradients are sums over trained tokens, so the cut has no influence on the result.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from finetune.core.errors import DataError
from finetune.core.types import Batch
from finetune.data.columns import release, shuffled, windows
from finetune.data.packing import collate_packed, pack
from finetune.data.rows import EncodedRow
from finetune.data.stored_rows import lengths_of, longest_of

_FINEST = 8  # tokens between padded lengths
_GROUP_COST = 64  # what a micro-batch costs besides its tokens, in tokens: dispatch, small products, sums


class BatchPlan:
    """The batches of every step, for all epochs. Each row comes exactly once an epoch, in the last step too."""

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        *,
        rows_per_step: int,
        max_rows: int,
        max_tokens: int | None,
        seed: int,
        pad_id: int,
        packing: bool = False,
    ) -> None:
        if not rows:
            raise DataError("There are no rows to train on.")
        self._rows = rows
        self._rows_per_step = rows_per_step
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._seed = seed
        self._pad_id = pad_id
        self._packing = packing
        self._longest = longest_of(rows) - 1
        self.steps_per_epoch = -(-len(rows) // rows_per_step)
        self._order: tuple[int, npt.NDArray[np.int32 | np.int64]] = (-1, np.empty(0, np.int32))

    def step(self, index: int) -> tuple[Batch, ...]:
        """The micro-batches of step `index`, counted from 0 over all epochs."""
        rows = [self._rows[number] for number in self.row_numbers(index)]
        if self._packing:
            return tuple(_packed(rows, self._max_rows, self._max_tokens))
        return tuple(_padded(rows, self._longest, self._max_rows, self._max_tokens, self._pad_id))

    def row_numbers(self, index: int) -> list[int]:
        """Which rows step `index` reads."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self._rows_per_step
        order = self._epoch_order(epoch)
        numbers: list[int] = order[start : start + self._rows_per_step].tolist()
        release(order)
        return numbers

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int32 | np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(len(self._rows), np.random.Generator(np.random.PCG64([self._seed, epoch]))))
        return self._order[1]


def evaluation_batches(
    rows: Sequence[EncodedRow], *, max_rows: int, max_tokens: int | None, pad_id: int, packing: bool = False
) -> Iterator[Batch]:
    """All rows once. The summed loss depends neither on how they are cut nor on how they are laid out."""
    longest = longest_of(rows) - 1 if rows else 0
    for window in windows(len(rows)):
        some = rows[window]
        yield from (
            _packed(some, max_rows, max_tokens) if packing else _padded(some, longest, max_rows, max_tokens, pad_id)
        )


def _packed(rows: Sequence[EncodedRow], max_rows: int, max_tokens: int | None) -> Iterator[Batch]:
    for group in pack((lengths_of(rows) - 1).tolist(), max_rows=max_rows, max_tokens=max_tokens):
        yield collate_packed([rows[number] for number in group])


def _padded(
    rows: Sequence[EncodedRow], longest: int, max_rows: int, max_tokens: int | None, pad_id: int
) -> Iterator[Batch]:
    lengths = lengths_of(rows)
    order = np.argsort(lengths, kind="stable")
    cuts = cut_by_length(lengths[order].tolist(), longest, max_rows=max_rows, max_tokens=max_tokens)
    for start, end in cuts:
        cut = [rows[number] for number in order[start:end].tolist()]
        yield collate(cut, padded_length(len(cut[-1]) - 1, longest), pad_id)


def padded_length(length: int, longest: int) -> int:
    """`length` rounded up to one of a few: eight for each doubling, at least 8 apart, at most `longest`."""
    spacing = max(_FINEST, 1 << max(0, (length - 1).bit_length() - 4))
    return min(longest, -(-length // spacing) * spacing)


def cut_by_length(
    ordered: Sequence[int], longest: int, *, max_rows: int, max_tokens: int | None
) -> Iterator[tuple[int, int]]:
    """Cut rows of ascending lengths into groups of at most `max_rows` rows and `max_tokens` padded tokens.

    Gives the first row of each group and the one behind its last.

    Of all such cuts it takes one with the least work: padded tokens, and _GROUP_COST for each group. A row that is
    longer than `max_tokens` by itself makes a group of one.
    """
    widths = [padded_length(length - 1, longest) for length in ordered]
    work, starts = [0], [0]
    for end, width in enumerate(widths, start=1):
        fitting = max_rows if max_tokens is None else min(max_rows, max(1, max_tokens // width))
        choices = ((work[start] + width * (end - start), start) for start in range(max(0, end - fitting), end))
        least, start = min(choices)
        work.append(least + _GROUP_COST)
        starts.append(start)
    cuts = [len(ordered)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    yield from pairwise(reversed(cuts))


def collate(rows: Sequence[EncodedRow], width: int, pad_id: int) -> Batch:
    """Rows side by side, targets shifted by one, padding at the right: never trained on, in segment 0."""
    shape = (len(rows), width)
    inputs, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    loss_mask = np.zeros(shape, np.bool_)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        length = len(row) - 1
        inputs[number, :length] = row.input_ids[:-1]
        targets[number, :length] = row.input_ids[1:]
        loss_mask[number, :length] = row.loss_mask[1:]
        positions[number, :length] = np.arange(length, dtype=np.int32)
        segments[number, :length] = 1
    return Batch(inputs, targets, loss_mask, positions, segments)

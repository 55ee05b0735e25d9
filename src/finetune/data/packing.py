"""Rows end to end instead of side by side: micro-batches without padding.

Which rows share a micro-batch has no influence on the result, as they do not see each other: each is a document
with a segment number and positions of its own. So they are dealt out to make the largest micro-batch small.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from finetune.core.types import Batch
from finetune.data.rows import EncodedRow


def pack(lengths: Sequence[int], *, max_rows: int, max_tokens: int | None) -> list[list[int]]:
    """Numbers of the rows of each micro-batch: at most `max_rows` rows and `max_tokens` tokens, of like size.

    Few groups, their sums of tokens close to each other. A row that is longer than `max_tokens` by itself makes a
    group of one. Depends on nothing but the arguments.
    """
    count = _fewest_groups(lengths, max_rows, max_tokens)
    while True:
        groups = _dealt(lengths, count, max_rows)
        if all(_fits([lengths[number] for number in group], max_tokens) for group in groups):
            return groups
        count = min(len(lengths), count + max(1, count // 16))


def _fewest_groups(lengths: Sequence[int], max_rows: int, max_tokens: int | None) -> int:
    """No cut has fewer groups than this: rows and tokens must fit, and two long rows never share a group."""
    bounds = [-(-len(lengths) // max_rows)]
    if max_tokens is not None:
        bounds.append(-(-sum(min(length, max_tokens) for length in lengths) // max_tokens))
        bounds.append(sum(2 * length > max_tokens for length in lengths))
    return min(max(bounds), len(lengths))


def _dealt(lengths: Sequence[int], count: int, max_rows: int) -> list[list[int]]:
    """Longest first, each row to the group with the fewest tokens that has room for a row (Graham 1969)."""
    groups: list[list[int]] = [[] for _ in range(count)]
    open_groups = [(0, number) for number in range(count)]
    for row in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        tokens, number = heapq.heappop(open_groups)
        groups[number].append(row)
        if len(groups[number]) < max_rows:
            heapq.heappush(open_groups, (tokens + lengths[row], number))
    return groups


def _fits(lengths: Sequence[int], max_tokens: int | None) -> bool:
    return max_tokens is None or len(lengths) == 1 or sum(lengths) <= max_tokens


def collate_packed(rows: Sequence[EncodedRow]) -> Batch:
    """One row [1, T] of documents end to end, targets shifted within each: none predicts the next one's start."""
    lengths = [len(row) - 1 for row in rows]
    inputs = np.concatenate([row.input_ids[:-1] for row in rows])
    targets = np.concatenate([row.input_ids[1:] for row in rows])
    loss_mask = np.concatenate([row.loss_mask[1:] for row in rows])
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    segments = np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), lengths)
    return Batch(inputs[None], targets[None], loss_mask[None], positions[None], segments[None])

"""Which step of a run needs most memory: found by the lengths of its rows, measured in its batches."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from finetune.core.types import Batch, IntArray
from finetune.data.columns import release

_MOST_STEPS = 20_000  # looked at; a longer run has looked alike by then
_HEAVY = 16  # steps whose batches are made and measured


class BatchSize(NamedTuple):
    """Of one micro-batch, in tokens."""

    tokens: int
    padded: int  # with what fills rows up to the longest
    longest: int  # document
    trained: int


class Steps(Protocol):
    """The data of each step (`data.batching.BatchPlan`)."""

    def step(self, index: int) -> Sequence[Batch]:
        """Micro-batches of step `index`, from 0 over all epochs."""
        ...

    def row_numbers(self, index: int) -> Sequence[int]:
        """Which rows step `index` reads."""
        ...


def heavy_steps(steps: Steps, lengths: IntArray, *, count: int, max_rows: int) -> Sequence[int]:
    """The few, among the first `count`, whose `max_rows` longest rows have most tokens, in their order.

    `lengths` are those of all rows.
    """

    def heaviness(index: int) -> int:
        found = np.sort(lengths[steps.row_numbers(index)])
        release(lengths)
        return int(found[-max_rows:].sum())

    return sorted(heapq.nlargest(_HEAVY, range(min(count, _MOST_STEPS)), key=heaviness))


def largest_batch(batches: Sequence[Batch]) -> BatchSize:
    """The sizes of a step's largest micro-batch, with the longest document of all of them."""
    largest = max(batches, key=lambda batch: batch.tokens)
    longest = max(_longest(batch) for batch in batches)
    return BatchSize(largest.tokens, largest.inputs.size, longest, largest.trained_tokens)


def _longest(batch: Batch) -> int:
    """Positions count from 0 in each document."""
    return int(batch.positions.max()) + 1

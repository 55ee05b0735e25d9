"""Which step of a run needs most memory: found by the lengths of its rows, measured in its batches."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from finetune.core.types import Batch, IntArray

_MOST_STEPS = 20_000  # looked at; a longer run has looked alike by then


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


def heaviest_step(steps: Steps, lengths: IntArray, *, count: int, max_rows: int, max_tokens: int | None) -> int:
    """The index, among the first `count`, of the step that can have the largest micro-batch.

    `lengths` are those of the rows. A micro-batch has at most `max_rows` of a step's rows and `max_tokens` tokens.
    """

    def largest(index: int) -> int:
        taken = sorted(lengths[steps.row_numbers(index)])
        tokens = int(sum(taken[-max_rows:]))
        return tokens if max_tokens is None else min(tokens, max(max_tokens, int(taken[-1])))

    return max(range(min(count, _MOST_STEPS)), key=largest)


def largest_batch(batches: Sequence[Batch]) -> BatchSize:
    """The sizes of a step's largest micro-batch, with the longest document of all of them."""
    largest = max(batches, key=lambda batch: batch.tokens)
    longest = max(_longest(batch) for batch in batches)
    return BatchSize(largest.tokens, largest.inputs.size, longest, largest.trained_tokens)


def _longest(batch: Batch) -> int:
    """Positions count from 0 in each document."""
    return int(batch.positions.max()) + 1

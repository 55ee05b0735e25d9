"""Which step of a run needs most memory: found by the lengths of its rows, measured in its batches."""

import heapq
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from finetune.core.types import Batch, IntArray
from finetune.data.columns import release
from finetune.engines.dealing import calls_of_each

_MOST_STEPS = 20_000  # looked at; a longer run has looked alike by then
_HEAVY = 16  # steps whose batches are made and measured


class BatchSize(NamedTuple):
    """In tokens: of one micro-batch, or of the parts of a step that are computed side by side."""

    tokens: int
    padded: int  # with what fills rows up to the longest
    longest: int  # document
    trained: int
    calls: int = 1  # of a step, one after the other
    sizes: int = 1  # how many different numbers of tokens micro-batches have


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


def largest_batch(steps: Sequence[Sequence[Batch]], *, graphs: int = 1) -> BatchSize:
    """The sizes of the largest micro-batch of these steps, with the longest document of all of them.

    Where parts of a step are computed side by side, `graphs` of them, the sizes of those that are together.
    """
    longest = max(_longest(batch) for batches in steps for batch in batches)
    if graphs > 1:
        sizes = [_side_by_side(batches, graphs) for batches in steps]
        calls = max(size.calls for size in sizes)
        return max(sizes, key=lambda size: size.tokens)._replace(longest=longest, calls=calls)
    largest = max((batch for batches in steps for batch in batches), key=lambda batch: batch.tokens)
    calls = max(len(batches) for batches in steps)
    kinds = len({batch.tokens for batches in steps for batch in batches})
    return BatchSize(largest.tokens, largest.inputs.size, longest, largest.trained_tokens, calls, kinds)


def _longest(batch: Batch) -> int:
    """Positions count from 0 in each document."""
    return int(batch.positions.max()) + 1


def _side_by_side(batches: Sequence[Batch], graphs: int) -> BatchSize:
    """The calls of all graphs that have most tokens together; their first ones are evaluated together, and so on."""
    documents = [document for batch in batches for document in _documents(batch)]
    lengths = [tokens for tokens, _ in documents]
    share = max(batch.inputs.size for batch in batches) // graphs
    hands = calls_of_each(lengths, workers=graphs, share=share)
    together = [list(chain.from_iterable(calls)) for calls in zip_longest(*hands, fillvalue=[])]
    largest = max(together, key=lambda numbers: sum(lengths[number] for number in numbers))
    tokens = sum(lengths[number] for number in largest)
    trained = sum(documents[number][1] for number in largest)
    return BatchSize(tokens, tokens, max(lengths), trained, len(together))


def _documents(batch: Batch) -> list[tuple[int, int]]:
    """(tokens, trained tokens) of each document that is trained on."""
    found = []
    for segments, mask in zip(batch.segments, batch.loss_mask, strict=True):
        tokens, trained = np.bincount(segments), np.bincount(segments, weights=mask)
        found += [(int(size), int(count)) for size, count in zip(tokens[1:], trained[1:], strict=True) if count]
    return found

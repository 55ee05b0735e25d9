"""Which step of a run needs most."""

from collections.abc import Iterable

import numpy as np

from finetune.core.types import Batch, BoolArray, IntArray
from finetune.data.batching import BatchPlan
from finetune.data.rows import EncodedRow, Origin
from finetune.planning.steps import heavy_steps, largest_batch

LENGTHS = [int(length) for length in np.random.default_rng(1).integers(2, 90, size=60)]


def encoded(length: int) -> EncodedRow:
    tokens: IntArray = np.ones(length + 1, np.int32)
    mask: BoolArray = np.arange(length + 1) > length // 2
    return EncodedRow(tokens, mask, Origin("rows.jsonl", 1))


def plan(*, packing: bool, rows_per_step: int, max_rows: int, max_tokens: int | None) -> BatchPlan:
    rows = [encoded(length) for length in LENGTHS]
    return BatchPlan(
        rows, rows_per_step=rows_per_step, max_rows=max_rows, max_tokens=max_tokens, seed=3, pad_id=0, packing=packing
    )


def most(batches: tuple[Batch, ...]) -> int:
    return largest_batch(batches).tokens


def all_of(steps: BatchPlan, indices: Iterable[int]) -> tuple[Batch, ...]:
    return tuple(batch for index in indices for batch in steps.step(index))


def test_the_heaviest_of_many_steps_is_found_by_its_lengths() -> None:
    for packing in (True, False):
        steps = plan(packing=packing, rows_per_step=4, max_rows=4, max_tokens=None)
        heavy = heavy_steps(steps, np.array(LENGTHS), count=45, max_rows=4)
        assert most(all_of(steps, heavy)) == most(all_of(steps, range(45)))


def test_where_micro_batches_are_limited_the_fullest_of_several_steps_counts() -> None:
    """The step with most tokens may be cut more evenly than another."""
    steps = plan(packing=True, rows_per_step=12, max_rows=12, max_tokens=200)
    heavy = heavy_steps(steps, np.array(LENGTHS), count=45, max_rows=12)
    size = largest_batch(all_of(steps, heavy))
    assert most(steps.step(heavy[0])) <= size.tokens <= 200
    assert size.tokens >= 0.9 * most(all_of(steps, range(45)))  # it is a sample of them
    assert size.longest <= max(LENGTHS)
    assert 0.4 < size.trained / size.tokens < 0.6

"""Which step of a run needs most."""

import numpy as np

from finetune.core.types import Batch, BoolArray, IntArray
from finetune.data.batching import BatchPlan
from finetune.data.rows import EncodedRow, Origin
from finetune.planning.steps import heaviest_step, largest_batch

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


def test_the_heaviest_of_many_steps_is_found_by_its_lengths() -> None:
    for packing in (True, False):
        steps = plan(packing=packing, rows_per_step=4, max_rows=4, max_tokens=None)
        index = heaviest_step(steps, np.array(LENGTHS), count=45, max_rows=4, max_tokens=None)
        assert most(steps.step(index)) == max(most(steps.step(number)) for number in range(45))


def test_a_limit_of_tokens_bounds_every_micro_batch() -> None:
    steps = plan(packing=True, rows_per_step=12, max_rows=6, max_tokens=128)
    index = heaviest_step(steps, np.array(LENGTHS), count=10, max_rows=6, max_tokens=128)
    size = largest_batch(steps.step(index))
    assert size.tokens <= 128
    assert size.longest <= max(LENGTHS)
    assert 0.4 < size.trained / size.tokens < 0.6

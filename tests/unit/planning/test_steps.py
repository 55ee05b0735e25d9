"""Which step of a run needs most."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np
import pytest

from finetune.core.types import Batch, BoolArray, IntArray
from finetune.data.batching import BatchPlan
from finetune.data.rows import EncodedRow, Origin
from finetune.planning.steps import BatchSize, heavy_steps, largest_batch

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
    return largest_batch([batches]).tokens


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
    size = largest_batch([all_of(steps, heavy)])
    assert most(steps.step(heavy[0])) <= size.tokens <= 200
    assert size.tokens >= 0.9 * most(all_of(steps, range(45)))  # it is a sample of them
    assert size.longest <= max(LENGTHS)
    assert 0.4 < size.trained / size.tokens < 0.6


def test_parts_side_by_side_have_the_documents_that_the_engine_computes_together() -> None:
    """Three rows on two workers: the third waits for the first."""
    batch = BatchPlan(
        [encoded(30)] * 3, rows_per_step=3, max_rows=3, max_tokens=None, seed=0, pad_id=0, packing=False
    ).step(0)
    assert largest_batch([batch]) == BatchSize(tokens=90, padded=90, longest=30, trained=45)
    assert largest_batch([batch], graphs=2) == BatchSize(tokens=60, padded=60, longest=30, trained=30, calls=2)


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_planned_side_by_side_is_what_mlx_evaluates_at_once(packing: bool) -> None:
    documents = pytest.importorskip("finetune.engines.mlx.documents")
    steps = plan(packing=packing, rows_per_step=12, max_rows=4, max_tokens=None)
    for index in range(8):
        hands = documents.arrange_for_workers(steps.step(index), layers=1, workers=2)
        at_once = [sum(call.inputs.size for call in calls if call) for calls in zip_longest(*hands)]
        assert largest_batch([steps.step(index)], graphs=2).tokens == max(at_once)


def test_micro_batches_of_a_step_and_their_different_sizes_are_counted() -> None:
    def step(lengths: list[int]) -> Sequence[Batch]:
        return BatchPlan(
            [encoded(length) for length in lengths], rows_per_step=3, max_rows=1, max_tokens=None, seed=0, pad_id=0,
            packing=False,
        ).step(0)  # fmt: skip

    assert largest_batch([step([30, 20, 20])])[-2:] == (3, 2)
    assert largest_batch([step([30, 30, 30]), step([10, 10, 10])])[-2:] == (3, 2)

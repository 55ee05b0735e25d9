"""Properties of batches: each row once an epoch, no padding trained, the same rows for the same step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.core.errors import DataError
from finetune.data.batching import BatchPlan, evaluation_batches, padded_length
from finetune.data.packing import pack
from finetune.data.rows import EncodedRow, Origin

PAD = 0
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=40)


def rows_of(lengths) -> list[EncodedRow]:
    """Rows whose tokens name the row: 1 + its number; the second half is trained on."""
    return [
        EncodedRow(np.full(n, number + 1, np.int32), np.arange(n) >= max(1, n // 2), Origin("f", number + 1))
        for number, n in enumerate(lengths)
    ]


def plan_of(lengths, rows_per_step=4, max_rows=2, max_tokens=None, seed=3, packing=False) -> BatchPlan:
    return BatchPlan(
        rows_of(lengths),
        rows_per_step=rows_per_step,
        max_rows=max_rows,
        max_tokens=max_tokens,
        seed=seed,
        pad_id=PAD,
        packing=packing,
    )


def rows_in(batches) -> Counter[int]:
    """Numbers of the rows, each counted where it begins."""
    begins = [batch.inputs[(batch.positions == 0) & (batch.segments > 0)] for batch in batches]
    return Counter(int(token) - 1 for tokens in begins for token in tokens)


@settings(max_examples=60)
@given(
    LENGTHS, st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(16, 300), st.integers(0, 5), st.booleans()
)
def test_every_row_is_read_exactly_once_an_epoch(lengths, rows_per_step, max_rows, max_tokens, epoch, packing):
    plan = plan_of(lengths, rows_per_step, max_rows, max_tokens, packing=packing)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    batches = [batch for step in steps for batch in plan.step(step)]

    assert rows_in(batches) == Counter(range(len(lengths)))
    assert all(len(plan.row_numbers(step)) <= rows_per_step for step in steps)


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.none() | st.integers(16, 300))
def test_micro_batches_keep_their_limits_and_train_no_padding(lengths, max_rows, max_tokens):
    rows = rows_of(lengths)
    plan = plan_of(lengths, len(lengths), max_rows, max_tokens)
    for batch in plan.step(0):
        count, width = batch.inputs.shape
        padding = batch.segments == 0
        assert count <= max_rows
        assert max_tokens is None or count == 1 or count * width <= max_tokens
        assert not (batch.loss_mask & padding).any()
        assert (batch.inputs[padding] == PAD).all()
        for inputs, targets, mask, positions, real in zip(
            batch.inputs, batch.targets, batch.loss_mask, batch.positions, ~padding, strict=True
        ):
            row = rows[int(inputs[0]) - 1]
            assert inputs[real].tolist() == row.input_ids[:-1].tolist()
            assert targets[real].tolist() == row.input_ids[1:].tolist()
            assert mask[real].tolist() == row.loss_mask[1:].tolist()
            assert positions[real].tolist() == list(range(len(row) - 1))


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.none() | st.integers(16, 300))
def test_packed_rows_lie_end_to_end_within_the_limits_and_nothing_is_padded(lengths, max_rows, max_tokens):
    rows = rows_of(lengths)
    for batch in plan_of(lengths, len(lengths), max_rows, max_tokens, packing=True).step(0):
        assert batch.inputs.shape == (1, batch.tokens)
        assert batch.documents <= max_rows
        assert max_tokens is None or batch.documents == 1 or batch.tokens <= max_tokens
        assert (np.diff(batch.segments[0]) >= 0).all()
        for segment in range(1, batch.documents + 1):
            here = batch.segments[0] == segment
            row = rows[int(batch.inputs[0, here][0]) - 1]
            assert batch.inputs[0, here].tolist() == row.input_ids[:-1].tolist()
            assert batch.targets[0, here].tolist() == row.input_ids[1:].tolist()
            assert batch.loss_mask[0, here].tolist() == row.loss_mask[1:].tolist()
            assert batch.positions[0, here].tolist() == list(range(len(row) - 1))


@settings(max_examples=200)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 8))
def test_packing_needs_no_more_micro_batches_than_rows_ask_for_and_evens_them_out(lengths, max_rows):
    groups = pack(lengths, max_rows=max_rows, max_tokens=None)
    sums = [sum(lengths[number] for number in group) for group in groups]

    assert len(groups) == -(-len(lengths) // max_rows)
    # No group could hand its smallest row to a lighter one with room and lower the largest sum.
    heaviest = groups[sums.index(max(sums))]
    smallest = min(lengths[number] for number in heaviest)
    assert all(
        total + smallest >= max(sums)
        for group, total in zip(groups, sums, strict=True)
        if len(group) < max_rows and group is not heaviest
    )


@settings(max_examples=200)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(50, 400))
def test_packing_to_a_budget_of_tokens_wastes_little_of_it(lengths, max_tokens):
    groups = pack(lengths, max_rows=len(lengths), max_tokens=max_tokens)
    # What next-fit in falling length reaches, a bound that is easy to be sure of: at most 1.7 of the least possible.
    fewest = max(1, -(-sum(lengths) // max_tokens), sum(2 * length > max_tokens for length in lengths))

    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    assert len(groups) <= max(fewest + 1, 1.7 * fewest)


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 60), st.booleans())
def test_a_step_depends_on_seed_and_number_alone(lengths, rows_per_step, step, packing):
    walked, fresh = (plan_of(lengths, rows_per_step, packing=packing) for _ in range(2))
    for earlier in range(step):
        walked.step(earlier)

    for one, other in zip(walked.step(step), fresh.step(step), strict=True):
        assert (one.inputs == other.inputs).all()
        assert (one.loss_mask == other.loss_mask).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [[plan_of([5] * 40, seed=seed).row_numbers(step) for step in range(20)] for seed in (1, 2)]

    assert orders[0] != orders[1]
    assert orders[0][:10] != orders[0][10:]


def test_trained_tokens_do_not_depend_on_how_rows_are_cut():
    rows = rows_of([5, 9, 30, 2, 17, 64, 3])
    totals = {
        sum(
            batch.trained_tokens
            for batch in evaluation_batches(rows, max_rows=n, max_tokens=t, pad_id=PAD, packing=packing)
        )
        for n, t in [(1, None), (7, None), (3, 80), (2, 20)]
        for packing in (False, True)
    }

    assert totals == {sum(int(row.loss_mask.sum()) for row in rows)}


@settings(max_examples=30)
@given(LENGTHS, st.integers(1, 5), st.booleans())
def test_evaluation_reads_every_row_once(lengths, max_rows, packing):
    rows = rows_of(lengths)
    batches = list(evaluation_batches(rows, max_rows=max_rows, max_tokens=None, pad_id=PAD, packing=packing))

    assert sum(batch.documents for batch in batches) == len(rows)
    assert rows_in(batches) == Counter(range(len(lengths)))


def test_padded_lengths_are_few_and_waste_little():
    widths = {padded_length(length, 4096) for length in range(1, 4097)}

    assert len(widths) <= 64
    assert all(padded_length(length, 4096) <= max(8, length * 1.13 + 8) for length in range(1, 4097))
    assert all(padded_length(length, 50) == min(50, -(-length // 8) * 8) for length in range(1, 51))


def test_rows_of_very_different_lengths_are_not_padded_to_the_longest():
    plan = plan_of([10] * 7 + [500], rows_per_step=8, max_rows=8)

    assert sorted(batch.inputs.shape for batch in plan.step(0)) == [(1, 499), (7, 16)]


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        plan_of([])

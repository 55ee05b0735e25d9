"""Properties of batches: each row once an epoch, no padding trained, the same rows for the same step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.core.errors import DataError
from finetune.data.batching import BatchPlan, evaluation_batches, padded_length
from finetune.data.rows import EncodedRow, Origin

PAD = 0
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=40)


def rows_of(lengths) -> list[EncodedRow]:
    """Rows whose tokens name the row: 1 + its number; the second half is trained on."""
    return [
        EncodedRow(np.full(n, number + 1, np.int32), np.arange(n) >= max(1, n // 2), Origin("f", number + 1))
        for number, n in enumerate(lengths)
    ]


def plan_of(lengths, rows_per_step=4, max_rows=2, max_tokens=None, seed=3) -> BatchPlan:
    return BatchPlan(
        rows_of(lengths), rows_per_step=rows_per_step, max_rows=max_rows, max_tokens=max_tokens, seed=seed, pad_id=PAD
    )


def rows_in(batches) -> Counter[int]:
    return Counter(int(row[0]) - 1 for batch in batches for row in batch.inputs)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(16, 300), st.integers(0, 5))
def test_every_row_is_read_exactly_once_an_epoch(lengths, rows_per_step, max_rows, max_tokens, epoch):
    plan = plan_of(lengths, rows_per_step, max_rows, max_tokens)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    batches = [batch for step in steps for batch in plan.step(step)]

    assert rows_in(batches) == Counter(range(len(lengths)))
    assert all(len(plan.row_numbers(step)) <= rows_per_step for step in steps)


@settings(deadline=None, max_examples=60)
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


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 60))
def test_a_step_depends_on_seed_and_number_alone(lengths, rows_per_step, step):
    walked, fresh = plan_of(lengths, rows_per_step), plan_of(lengths, rows_per_step)
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
        sum(batch.trained_tokens for batch in evaluation_batches(rows, max_rows=n, max_tokens=t, pad_id=PAD))
        for n, t in [(1, None), (7, None), (3, 80), (2, 20)]
    }

    assert totals == {sum(int(row.loss_mask.sum()) for row in rows)}


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 5))
def test_evaluation_reads_every_row_once(lengths, max_rows):
    batches = list(evaluation_batches(rows_of(lengths), max_rows=max_rows, max_tokens=None, pad_id=PAD))

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

"""Learning rates by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.training.schedules import constant, cosine, linear, make_schedule

NAMES = ["constant", "linear", "cosine"]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_in_equal_parts_from_the_first_step_to_the_peak(name):
    schedule = make_schedule(name, 0.8, warmup_steps=4, total_steps=100)

    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


@pytest.mark.parametrize("name", NAMES)
def test_without_warm_up_the_first_step_has_the_peak(name):
    assert make_schedule(name, 3e-4, warmup_steps=0, total_steps=10)(0) == pytest.approx(3e-4)


def test_cosine_is_halfway_between_peak_and_floor_in_the_middle():
    schedule = cosine(1.0, warmup_steps=10, total_steps=110, floor=0.2)

    assert schedule(60) == pytest.approx(0.6)


def test_linear_falls_by_the_same_amount_each_step():
    schedule = linear(1.0, warmup_steps=0, total_steps=4)

    assert [schedule(step) for step in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_constant_stays_at_the_peak_however_long_the_run():
    assert {constant(0.5, warmup_steps=2)(step) for step in range(2, 1000, 7)} == {0.5}


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_floor_holds_at_the_end_and_after_it(name):
    schedule = make_schedule(name, 1.0, warmup_steps=3, total_steps=20, floor=0.1)

    assert [schedule(20), schedule(21), schedule(10**6)] == pytest.approx([0.1, 0.1, 0.1])


@given(
    name=st.sampled_from(NAMES),
    peak=st.floats(1e-6, 1.0),
    warmup=st.integers(0, 60),
    total=st.integers(1, 50),
    step=st.integers(0, 200),
)
def test_a_rate_is_never_negative_and_never_above_the_peak(name, peak, warmup, total, step):
    rate = make_schedule(name, peak, warmup_steps=warmup, total_steps=total)(step)

    assert 0.0 <= rate <= peak * (1 + 1e-12)


@given(warmup=st.integers(0, 20), total=st.integers(21, 80))
def test_after_the_warm_up_the_rate_never_rises(warmup, total):
    for name in ("linear", "cosine"):
        schedule = make_schedule(name, 1.0, warmup_steps=warmup, total_steps=total)
        rates = [schedule(step) for step in range(warmup, total + 3)]
        assert rates == sorted(rates, reverse=True)

"""How long a run is, and its defaults."""

import pytest

from finetune.config.schema import OutputConfig, TrainingConfig
from finetune.training.plan import make_plan


def planned(steps_per_epoch=100, *, eval_steps=None, checkpoint_steps=None, **training):
    output = OutputConfig(eval_steps=eval_steps, checkpoint_steps=checkpoint_steps)
    return make_plan(TrainingConfig(**training), output, steps_per_epoch=steps_per_epoch)


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({}, 300),
        ({"epochs": 2}, 200),
        ({"epochs": 0.5}, 50),
        ({"epochs": 0.001}, 1),
        ({"epochs": 1.005}, 101),
        ({"max_steps": 7}, 7),
        ({"max_steps": 1000}, 1000),
        ({"max_steps": 150, "epochs": 2}, 150),
        ({"max_steps": 1000, "epochs": 2}, 200),
    ],
)
def test_the_first_limit_ends_the_run(training, steps):
    assert planned(**training).total_steps == steps


def test_a_tenth_of_thirty_steps_is_three_whatever_floating_point_says():
    assert planned(30, epochs=0.1).total_steps == 3


@pytest.mark.parametrize(("steps", "warmup"), [(100, 5), (10, 0), (10_000, 100)])
def test_warm_up_is_five_percent_and_at_most_a_hundred(steps, warmup):
    assert planned(max_steps=steps).warmup_steps == warmup


def test_evaluations_are_a_tenth_of_the_run_apart_and_checkpoints_follow_them():
    plan = planned(max_steps=95)

    assert (plan.eval_steps, plan.checkpoint_steps) == (10, 10)
    assert [step for step in range(96) if plan.evaluates_at(step)] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95]
    assert planned(eval_steps=7).checkpoint_steps == 7
    assert planned(eval_steps=7, checkpoint_steps=3).checkpoint_steps == 3


def test_every_inferred_value_is_said_and_no_given_one():
    assert [notice.split("=")[0] for notice in planned().notices] == [
        "training.epochs",
        "training.warmup_steps",
        "output.eval_steps",
    ]
    assert planned(epochs=1, warmup_steps=3, eval_steps=2).notices == ()


def test_limits_that_meet_are_said():
    assert (
        "max_steps=10 ends the run before" in planned(epochs=2, max_steps=10, warmup_steps=1, eval_steps=1).notices[0]
    )
    assert "never reaches its peak" in planned(max_steps=10, warmup_steps=10, eval_steps=1).notices[0]

"""The state of a run as a value."""

import math

import pytest

from finetune.core.errors import CheckpointError
from finetune.core.types import LossSum, StepResult
from finetune.training.state import TrainingState


def evaluated(state, *losses, threshold=0.0, first_step=1):
    for offset, loss in enumerate(losses):
        at = TrainingState(**{**_fields(state), "step": first_step + offset})
        state = at.after_evaluation(LossSum(loss * 10, 10, 4), threshold=threshold)
    return state


def _fields(state):
    return {name: getattr(state, name) for name in TrainingState.__dataclass_fields__}


def test_state_survives_json_exactly():
    state = TrainingState(step=3, last_loss=1 / 3, step_seconds=0.1 + 0.2, best_eval_loss=2e-17, best_step=2)

    assert TrainingState.from_json(state.to_json()) == state


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1}', "{"])
def test_a_file_that_is_no_state_is_refused(text):
    with pytest.raises(CheckpointError, match=r"state\.json"):
        TrainingState.from_json(text)


def test_a_step_adds_its_tokens_and_its_time():
    state = TrainingState().after_step(StepResult(2.0, 1.0, applied=True), tokens=100, trained_tokens=40, seconds=0.5)
    state = state.after_step(StepResult(1.5, 1.0, applied=True), tokens=50, trained_tokens=20, seconds=0.25)

    assert (state.step, state.tokens_processed, state.tokens_trained, state.step_seconds) == (2, 150, 60, 0.75)
    assert state.last_loss == 1.5


def test_a_skipped_step_counts_as_a_step_but_trains_nothing():
    before = TrainingState(step=4, last_loss=2.0)
    state = before.after_step(StepResult(math.nan, math.nan, applied=False), tokens=9, trained_tokens=5, seconds=1)

    assert (state.step, state.skipped, state.consecutive_skipped) == (5, 1, 1)
    assert (state.tokens_processed, state.tokens_trained, state.last_loss) == (9, 0, 2.0)


def test_a_step_that_is_applied_ends_a_row_of_skipped_ones():
    state = TrainingState(step=4, skipped=3, consecutive_skipped=3)
    state = state.after_step(StepResult(1.0, 1.0, applied=True), tokens=1, trained_tokens=1, seconds=1)

    assert (state.skipped, state.consecutive_skipped) == (3, 0)


def test_the_evaluation_before_the_first_step_is_never_the_best():
    state = evaluated(TrainingState(), 1.0, first_step=0)

    assert state.initial_eval_loss == 1.0
    assert state.best_step is None
    assert state.evaluations_without_improvement == 0


def test_the_best_is_the_lowest_loss_and_the_first_of_equals():
    state = evaluated(TrainingState(), 3.0, 2.0, 2.5, 2.0)

    assert (state.best_eval_loss, state.best_step, state.final_eval_loss) == (2.0, 2, 2.0)


def test_patience_counts_evaluations_that_do_not_improve():
    state = evaluated(TrainingState(), 3.0, 2.0, 2.5, 2.2)

    assert state.evaluations_without_improvement == 2


def test_an_improvement_below_the_threshold_is_the_best_but_spends_patience():
    state = evaluated(TrainingState(), 3.0, 2.95, 2.91, threshold=0.1)

    assert (state.best_step, state.evaluations_without_improvement) == (3, 2)


def test_small_improvements_that_add_up_restore_patience():
    state = evaluated(TrainingState(), 3.0, 2.95, 2.85, threshold=0.1)

    assert state.evaluations_without_improvement == 0


def test_a_loss_that_is_not_finite_is_never_better():
    state = evaluated(TrainingState(), math.nan, 2.0, math.nan)

    assert (state.best_step, state.evaluations_without_improvement) == (2, 1)

"""The loop, on a small deterministic engine."""

import math
import signal
from pathlib import Path

import pytest
from tests.support.fake_engine import FakeSession
from tests.support.fake_run import FakeRun, plan

from finetune.core.errors import TrainingError
from finetune.core.events import EvalCompleted, Notice, SampleGenerated, StepCompleted, StepSkipped
from finetune.core.paths import RunPaths
from finetune.training.checkpoints import read_state
from finetune.training.signals import StopRequest


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> FakeRun:
    """The uninterrupted run that others are compared with."""
    run = FakeRun(tmp_path_factory.mktemp("whole") / "run")
    run.go()
    return run


def evaluations(run: FakeRun) -> list[EvalCompleted]:
    return [event for event in run.events if isinstance(event, EvalCompleted)]


def test_training_lowers_the_evaluation_loss(whole):
    losses = [event.loss for event in evaluations(whole)]

    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_comes_before_the_first_step_at_its_cadence_and_at_the_end(tmp_path):
    run = FakeRun(tmp_path / "run", plan(total_steps=12, eval_steps=5))
    run.go()

    assert [event.step for event in evaluations(run)] == [0, 5, 10, 12]
    assert isinstance(run.events[0], EvalCompleted)
    assert [event.step for event in run.events if isinstance(event, SampleGenerated)] == [0, 5, 10, 12]


def test_checkpoints_come_at_their_cadence_at_each_new_best_and_at_the_end(tmp_path):
    run = FakeRun(tmp_path / "run", plan(total_steps=10, eval_steps=3, checkpoint_steps=4))
    run.go()

    best = [event.step for event in evaluations(run) if event.is_best]
    assert run.saved_steps() == sorted({4, 8, 10, *best})


def test_the_learning_rate_of_each_step_is_the_schedules(whole):
    assert [rate for _, _, rate in whole.curve()] == [whole.plan.schedule(step) for step in range(20)]


def test_without_validation_there_is_no_evaluation_and_the_last_checkpoint_is_the_result(tmp_path):
    run = FakeRun(tmp_path / "run", validation=None)
    outcome = run.go()

    assert evaluations(run) == []
    assert (outcome.reason, outcome.state.step, outcome.state.best_step) == ("completed", 20, None)
    assert run.checkpoints.steps()[-1] == 20


@pytest.mark.parametrize("stop_after", [1, 4, 5, 10, 13, 19])
def test_a_run_that_is_stopped_after_any_step_and_resumed_equals_the_uninterrupted_one(tmp_path, whole, stop_after):
    run = FakeRun(tmp_path / "run")

    def ask(event):
        if isinstance(event, StepCompleted) and event.step == stop_after:
            run.stop.ask(signal.SIGTERM)

    assert run.go(listener=ask).reason == "SIGTERM"
    assert run.checkpoints.steps()[-1] == stop_after
    run.stop = StopRequest()
    outcome = run.go()

    assert outcome.reason == "completed"
    assert run.final_bytes() == whole.final_bytes()
    assert run.curve() == whole.curve()
    assert [(event.step, event.loss) for event in evaluations(run)] == [
        (event.step, event.loss) for event in evaluations(whole)
    ]


class Killed(BaseException):
    """What SIGKILL is to a process: nothing after it runs."""


@pytest.mark.parametrize("events_before", range(0, 60, 6))
def test_a_run_that_dies_anywhere_and_is_resumed_equals_the_uninterrupted_one(tmp_path, whole, events_before):
    run = FakeRun(tmp_path / "run")

    def die(_event):
        if len(run.events) > events_before:
            raise Killed

    try:
        run.go(listener=die)
    except Killed:
        run.go()

    assert run.final_bytes() == whole.final_bytes()
    assert run.curve() == whole.curve()
    assert _best(run) == _best(whole)


def _best(run: FakeRun) -> tuple[float | None, int | None, Path]:
    state = read_state(RunPaths(run.root).checkpoint(20))
    return state.best_eval_loss, state.best_step, RunPaths(run.root).best.readlink()


def test_a_stop_during_an_evaluation_leaves_it_due(tmp_path, whole):
    run = FakeRun(tmp_path / "run")
    session = FakeSession()
    plain_loss = session.loss

    def stop_in_the_second_evaluation(batch):
        if session.calls[0] == 5:
            run.stop.ask(signal.SIGINT)
        return plain_loss(batch)

    session.loss = stop_in_the_second_evaluation
    assert run.go(session).reason == "SIGINT"
    assert read_state(RunPaths(run.root).checkpoint(5)).evaluated_step == 0
    run.stop = StopRequest()
    run.go()

    assert [event.step for event in evaluations(run)] == [event.step for event in evaluations(whole)]
    assert run.final_bytes() == whole.final_bytes()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole):
    run = FakeRun(tmp_path / "run")
    run.go(listener=lambda event: run.stop.ask() if getattr(event, "step", 0) == 11 else None)
    (RunPaths(run.root).checkpoint(11) / "state.json").write_text("torn")
    run.stop = StopRequest()
    run.go()

    assert run.final_bytes() == whole.final_bytes()
    assert run.curve() == whole.curve()


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = FakeRun(tmp_path / "run")
    run.go()
    before, told = run.final_bytes(), len(run.events)
    outcome = run.go()

    assert (outcome.reason, run.final_bytes(), len(run.events)) == ("completed", before, told)


def test_early_stopping_ends_the_run_and_stays_ended_after_a_resume(tmp_path):
    run = FakeRun(tmp_path / "run", plan(total_steps=40, eval_steps=2, patience=2, threshold=10.0))
    outcome = run.go()

    # The first evaluation sets the reference; two more that do not improve by 10 nats spend the patience.
    assert (outcome.reason, outcome.state.step) == ("early_stopping", 6)
    assert run.go().state.step == 6


def test_steps_that_are_not_finite_are_counted_and_after_five_in_a_row_the_run_goes_back_and_fails(tmp_path):
    run = FakeRun(tmp_path / "run", plan(checkpoint_steps=4))
    session = FakeSession(not_finite_from=7)

    with pytest.raises(TrainingError, match=r"5 steps in a row, 7 to 11.*step-000010.*training\.learning_rate"):
        run.go(session)
    skipped = [event for event in run.events if isinstance(event, StepSkipped)]
    assert [(event.step, event.consecutive) for event in skipped] == [(7, 1), (8, 2), (9, 3), (10, 4), (11, 5)]
    assert session.calls[0] == 10  # the session is back at the checkpoint


def test_an_evaluation_that_is_not_finite_is_said(tmp_path):
    run = FakeRun(tmp_path / "run", plan(total_steps=2))
    session = FakeSession()
    session.table[:] = math.nan

    run.go(session)

    assert any(isinstance(event, Notice) and "not finite" in event.message for event in run.events)


def test_memory_that_runs_out_is_a_clear_error(tmp_path):
    class Small(FakeSession):
        def step(self, micro_batches, *, learning_rate):
            raise MemoryError

    with pytest.raises(TrainingError, match=r"step 1\. Lower training\.batch_size"):
        FakeRun(tmp_path / "run").go(Small())

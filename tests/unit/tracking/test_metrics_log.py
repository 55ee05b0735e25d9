"""metrics.jsonl and its readers."""

import json
import math

import pytest

from finetune.core.errors import FinetuneError
from finetune.core.events import CheckpointSaved, EvalCompleted, Notice, StepCompleted
from finetune.tracking.metrics_log import MetricsLog, cut_after, read_events


def step(number: int, loss: float = 1.0) -> StepCompleted:
    return StepCompleted(
        step=number,
        loss=loss,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens=10,
        tokens_per_second=5.0,
        memory_gb=0.5,
        time=2.0,
    )


def evaluation(number: int, loss: float = 1.0) -> EvalCompleted:
    return EvalCompleted(step=number, loss=loss, perplexity=2.0, accuracy=0.5)


def write(path, *events) -> None:
    log = MetricsLog(path)
    for event in events:
        log(event)
    log.close()


def test_each_event_is_a_line_on_disk_before_the_next_one_comes(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log(step(1))
    first = json.loads((tmp_path / "metrics.jsonl").read_text())
    log(CheckpointSaved(step=1, path="checkpoints/step-000001"))
    log.close()

    assert list(first) == [
        "event", "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb", "time",
    ]  # fmt: skip
    assert [record["event"] for record in read_events(tmp_path / "metrics.jsonl")] == ["step", "checkpoint"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write(tmp_path / "metrics.jsonl", evaluation(1, loss=math.nan), step(2, loss=math.inf))

    assert [record["loss"] for record in read_events(tmp_path / "metrics.jsonl")] == [None, None]


def test_losses_survive_exactly(tmp_path):
    write(tmp_path / "metrics.jsonl", step(1, loss=1 / 3))
    cut_after(tmp_path / "metrics.jsonl", step=1, evaluated_step=-1)

    assert read_events(tmp_path / "metrics.jsonl")[0]["loss"] == 1 / 3


@pytest.mark.parametrize("length", range(1, 200, 9))
def test_a_torn_last_line_is_tolerated_wherever_it_is_torn(tmp_path, length):
    path = tmp_path / "metrics.jsonl"
    write(path, step(1), step(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][: min(length, len(lines[1]) - 2)])

    assert [record["step"] for record in read_events(path)] == [1]


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "step"}\nhello\n{"event": "step"}\n')

    with pytest.raises(FinetuneError, match=r"metrics\.jsonl:2"):
        read_events(tmp_path / "metrics.jsonl")


def test_an_absent_log_is_empty(tmp_path):
    assert read_events(tmp_path / "metrics.jsonl") == []


def test_cutting_leaves_each_step_once_and_what_has_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    notice = Notice(level="info", message="hello")
    write(path, notice, evaluation(0), step(1), step(2), evaluation(2), step(3), notice)
    with path.open("ab") as file:
        file.write(b'{"event": "st')

    cut_after(path, step=2, evaluated_step=0)

    kept = [(record["event"], record.get("step")) for record in read_events(path)]
    assert kept == [("notice", None), ("eval", 0), ("step", 1), ("step", 2), ("notice", None)]


def test_cutting_back_to_the_beginning_leaves_no_evaluation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, evaluation(0), step(1))
    cut_after(path, step=0, evaluated_step=-1)

    assert read_events(path) == []

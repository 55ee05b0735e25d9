"""Events as sentences, in the log and on the console."""

import io

import pytest
from rich.console import Console

from finetune.core.events import (
    CheckpointSaved,
    EvalCompleted,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    SampleGenerated,
    StepCompleted,
    StepSkipped,
)
from finetune.tracking.console import ConsoleListener
from finetune.tracking.lines import describe, duration, one_line
from finetune.tracking.text_log import TextLog

STARTED = RunStarted(
    run_dir="outputs/[x]",
    engine="mlx",
    method="lora",
    model="demo",
    total_steps=40,
    steps_per_epoch=20,
    trainable_parameters=10,
    total_parameters=1000,
    train_rows=80,
    validation_rows=8,
)


def step(number: int) -> StepCompleted:
    return StepCompleted(
        step=number,
        loss=1.25,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=10,
        tokens_per_second=1234.5,
        memory_gb=0.5,
        time=2.0,
    )


def sample(number: int, prompt: str = "2 + 2 =") -> SampleGenerated:
    return SampleGenerated(step=number, prompt=prompt, expected="4", output="[bold]5")


EVENTS: list[Event] = [
    Notice(level="info", message="Template: chatml"),
    Notice(level="warning", message="careful [now]"),
    STARTED,
    EvalCompleted(step=0, loss=3.0, perplexity=20.1, accuracy=0.25),
    sample(0),
    *(step(number) for number in range(1, 41)),
    StepSkipped(step=7, consecutive=2),
    EvalCompleted(step=40, loss=1.0, perplexity=2.72, accuracy=0.5, is_best=True),
    CheckpointSaved(step=40, path="checkpoints/step-000040"),
    RunFinished(step=40, reason="completed", seconds=75.0),
]


def shown(events: list[Event], *, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, color_system=None, highlight=False)
    with ConsoleListener(console=console) as listener:
        for event in events:
            listener(event)
    return text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_tells_what_matters(terminal):
    text = shown(EVENTS, terminal=terminal)

    for words in (
        "lora of demo",
        "careful [now]",
        "outputs/[x]",
        "[bold]5",
        "1.0000",
        "50.0%",
        "best so far",
        "Finished",
    ):
        assert words in text
    assert "40/40" in text


def test_plain_output_is_about_twenty_lines_of_steps_and_has_no_control_codes():
    text = shown(EVENTS, terminal=False)

    assert 15 <= text.count("\nstep ") <= 25
    assert "\x1b" not in text


def test_a_bar_is_taken_away_where_a_run_fails():
    text = shown(EVENTS[:5], terminal=True)

    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back


def test_between_first_and_last_evaluation_one_sample_is_enough():
    events = [STARTED, *(sample(at, f"prompt {n} at {at}") for at in (0, 20, 40) for n in range(3))]
    text = shown(events, terminal=False)

    assert [text.count(f"at {at}'") for at in (0, 20, 40)] == [3, 1, 3]


def test_the_log_has_every_event_with_its_time(tmp_path):
    log = TextLog(tmp_path / "training.log")
    for event in EVENTS:
        log(event)
    log.close()
    lines = (tmp_path / "training.log").read_text().splitlines()

    assert len(lines) == len(EVENTS)
    assert lines[1].endswith("Warning: careful [now]")
    assert all(line[:4].isdigit() for line in lines)


def test_an_early_end_and_a_signal_are_said_as_such():
    finish = RunFinished(step=4, reason="SIGTERM", seconds=1.0)

    assert describe(finish, 10) == "Stopped by SIGTERM at step 4 after 1.0 s"
    assert "no better evaluation" in str(describe(RunFinished(step=4, reason="early_stopping", seconds=1.0), 10))


def test_an_unknown_event_says_nothing():
    assert describe(Event(), 1) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (75, "1 min 15 s"), (3600 * 3 + 60 * 20, "3 h 20 min")]
)
def test_times_are_said_as_people_do(seconds, words):
    assert duration(seconds) == words


def test_long_text_is_cut_and_put_on_one_line():
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 1000)) == 160

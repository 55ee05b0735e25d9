"""Events as sentences: what `training.log` and a terminal without colours show."""

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

MOST_CHARACTERS = 160


def describe(event: Event, total_steps: int) -> str | None:
    """One line for an event; None for one that says nothing to people."""
    match event:
        case StepCompleted() | StepSkipped():
            return f"step {event.step}/{total_steps}  {_step(event)}"
        case EvalCompleted() | SampleGenerated():
            return _evaluation(event)
        case Notice():
            return event.message if event.level == "info" else f"Warning: {event.message}"
        case CheckpointSaved():
            return f"checkpoint {event.path}"
        case RunStarted() | RunFinished():
            return _run(event)
        case _:
            return None


def _step(event: StepCompleted | StepSkipped) -> str:
    if isinstance(event, StepSkipped):
        return f"skipped: loss or gradient is not finite ({event.consecutive} in a row)"
    return (
        f"loss {event.loss:.4f}  learning rate {event.learning_rate:.2e}  "
        f"{event.tokens_per_second:,.0f} tokens/s  {event.memory_gb:.2f} GB"
    )


def _evaluation(event: EvalCompleted | SampleGenerated) -> str:
    if isinstance(event, SampleGenerated):
        said, expected = one_line(event.output), one_line(event.expected)
        return f"sample  {one_line(event.prompt)!r} -> {said!r}, expected {expected!r}"
    best = "  (best so far)" if event.is_best else ""
    return (
        f"evaluation at step {event.step}  loss {event.loss:.4f}  perplexity {event.perplexity:,.2f}  "
        f"accuracy {event.accuracy:.1%}{best}"
    )


def _run(event: RunStarted | RunFinished) -> str:
    if isinstance(event, RunFinished):
        return f"{finish_words(event.reason)} at step {event.step} after {duration(event.seconds)}"
    return _started(event)


def _started(event: RunStarted) -> str:
    share = event.trainable_parameters / max(1, event.total_parameters)
    resumed = f", resumed at step {event.resumed_from}" if event.resumed_from is not None else ""
    return (
        f"{event.method} of {event.model} on {event.engine}: {event.train_rows:,} rows to train on, "
        f"{event.validation_rows:,} to evaluate on, {event.total_steps:,} steps "
        f"({event.steps_per_epoch:,} an epoch), {event.trainable_parameters:,} of {event.total_parameters:,} "
        f"parameters trained ({share:.2%}){resumed}. Run directory: {event.run_dir}"
    )


def finish_words(reason: str) -> str:
    """How a run ended, for people."""
    words = {"completed": "Finished", "early_stopping": "Stopped early (no better evaluation)"}
    return words.get(reason, f"Stopped by {reason}")


def duration(seconds: float) -> str:
    """A time as people say it: 48.3 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def one_line(text: str) -> str:
    """Text without line ends, cut where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MOST_CHARACTERS else f"{flat[: MOST_CHARACTERS - 1]}…"

"""What happens during a run, as values. The terminal, the logs and the web interface only listen.

`record()` is the line that `metrics.jsonl` holds for the event: plain JSON types, `event` first.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events. `name` is the value of `event` in `metrics.jsonl`."""

    name: ClassVar[str]

    def record(self) -> dict[str, Any]:
        """The event as one JSON object."""
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """Everything is prepared and the first step is next. `resumed_from` is a step, or None."""

    name: ClassVar[str] = "start"
    run_dir: str
    engine: str
    method: str
    model: str
    total_steps: int
    steps_per_epoch: int
    trainable_parameters: int
    total_parameters: int
    train_rows: int
    validation_rows: int
    resumed_from: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCompleted(Event):
    """One optimizer step, counted from 1. `tokens` are its real tokens; `time` is seconds since the start."""

    name: ClassVar[str] = "step"
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    memory_gb: float
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped(Event):
    """A step whose loss or gradient was not finite: nothing was updated."""

    name: ClassVar[str] = "skipped"
    step: int
    consecutive: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalCompleted(Event):
    """The validation rows, or output.eval_rows of them. Loss in nats per trained token."""

    name: ClassVar[str] = "eval"
    step: int
    loss: float
    perplexity: float
    accuracy: float
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGenerated(Event):
    """The model's own answer to a validation prompt, beside the expected one."""

    name: ClassVar[str] = "sample"
    step: int
    prompt: str
    expected: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is on disk, whole."""

    name: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Event):
    """A sentence for the person: an inferred value, a recommendation, a warning."""

    name: ClassVar[str] = "notice"
    level: Literal["info", "warning"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """The run is over: `reason` is `completed`, `early_stopping`, or the signal's name."""

    name: ClassVar[str] = "finish"
    step: int
    reason: str
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)


Listener: TypeAlias = Callable[[Event], None]

"""The run on a terminal: a progress bar with loss, rate, tokens/s, memory and ETA; plain lines elsewhere."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

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
from finetune.tracking.lines import describe, duration, finish_words, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PLAIN_LINES_A_RUN = 20
SECONDS_BETWEEN_PLAIN_LINES = 15.0


class ConsoleListener:
    """Shows a run while it goes on. Use it as a context manager: leaving it gives the terminal back.

    `stderr=True` keeps standard output free for one JSON document.
    """

    def __init__(self, *, stderr: bool = False, console: "Console | None" = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=stderr, highlight=False, soft_wrap=True)
        self._show: _Bar | _Plain = _Bar(self._console) if self._console.is_terminal else _Plain(self._console)
        self._samples = _FewSamples()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show.close()

    def __call__(self, event: Event) -> None:
        if self._samples.lets_through(event):
            self._show(event)


class _FewSamples:
    """All samples of the first and the last evaluation, one of each in between: the log has the rest."""

    def __init__(self) -> None:
        self._last_step = 0
        self._shown_at = -1

    def lets_through(self, event: Event) -> bool:
        """Whether the event is to be shown."""
        if isinstance(event, RunStarted):
            self._last_step = event.total_steps
        if not isinstance(event, SampleGenerated):
            return True
        is_first, self._shown_at = event.step != self._shown_at, event.step
        return is_first or event.step in {0, self._last_step}


class _Plain:
    """One line an event; of the steps, about twenty a run and one every fifteen seconds."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._total_steps = 0
        self._shown = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._total_steps = event.total_steps
        if isinstance(event, CheckpointSaved) or (isinstance(event, StepCompleted) and not self._is_due(event.step)):
            return
        line = describe(event, self._total_steps)
        if line is not None:
            self._console.out(line, highlight=False)

    def _is_due(self, step: int) -> bool:
        now = time.monotonic()
        interval = max(1, self._total_steps // PLAIN_LINES_A_RUN)
        due = step == 1 or step % interval == 0 or now - self._shown >= SECONDS_BETWEEN_PLAIN_LINES
        if due:
            self._shown = now
        return due

    def close(self) -> None:
        """Nothing is held."""


class _Bar:
    """A live bar below the lines that stay."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total_steps = 0

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case StepCompleted():
                self._advance(event)
            case RunFinished():
                self.close()
                self._print(f"[bold green]{finish_words(event.reason)}[/] in {duration(event.seconds)}")
            case EvalCompleted():
                self._print(_evaluation(event))
            case SampleGenerated():
                self._print(_sample(event))
            case Notice():
                self._print(_notice(event))
            case StepSkipped():
                self._print(f"[yellow]{describe(event, self._total_steps)}[/]")

    def close(self) -> None:
        """Take the bar away and give the cursor back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, markup: str) -> None:
        self._console.print(markup)

    def _start(self, event: RunStarted) -> None:
        self._total_steps = event.total_steps
        self._print(_headline(event))
        self._progress = _make_progress(self._console)
        self._task = self._progress.add_task(
            "training",
            total=event.total_steps,
            completed=event.resumed_from or 0,
            loss="-",
            rate="-",
            speed="-",
            memory="-",
        )
        self._progress.start()

    def _advance(self, event: StepCompleted) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task,
                completed=event.step,
                loss=f"{event.loss:.4f}",
                rate=f"{event.learning_rate:.1e}",
                speed=f"{event.tokens_per_second:,.0f}",
                memory=f"{event.memory_gb:.2f}",
            )


def _make_progress(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss [bold]{task.fields[loss]}"),
        TextColumn("lr {task.fields[rate]}"),
        TextColumn("{task.fields[speed]} tok/s"),
        TextColumn("{task.fields[memory]} GB"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        expand=True,
    )


def _headline(event: RunStarted) -> str:
    from rich.markup import escape

    share = event.trainable_parameters / max(1, event.total_parameters)
    resumed = f"  [dim]resumed at step {event.resumed_from}[/]" if event.resumed_from is not None else ""
    return (
        f"[bold]{event.method}[/] of [bold]{escape(event.model)}[/] on {event.engine}{resumed}\n"
        f"  {event.train_rows:,} rows to train on, {event.validation_rows:,} to evaluate on, "
        f"{event.total_steps:,} steps\n"
        f"  {event.trainable_parameters:,} of {event.total_parameters:,} parameters trained ({share:.2%})\n"
        f"  [dim]{escape(event.run_dir)}[/]"
    )


def _evaluation(event: EvalCompleted) -> str:
    best = "  [green]best so far[/]" if event.is_best else ""
    return (
        f"[cyan]step {event.step:>5}[/]  evaluation loss [bold]{event.loss:.4f}[/]  "
        f"perplexity {event.perplexity:,.2f}  accuracy {event.accuracy:.1%}{best}"
    )


def _sample(event: SampleGenerated) -> str:
    from rich.markup import escape

    mark = "[green]=[/]" if event.output.strip() == event.expected.strip() else "[yellow]~[/]"
    return (
        f"  [dim]{escape(one_line(event.prompt))}[/]\n"
        f"    expected {escape(one_line(event.expected))}\n"
        f"    {mark} model  {escape(one_line(event.output))}"
    )


def _notice(event: Notice) -> str:
    from rich.markup import escape

    return (
        f"[yellow]Warning:[/] {escape(event.message)}"
        if event.level == "warning"
        else f"[dim]{escape(event.message)}[/]"
    )

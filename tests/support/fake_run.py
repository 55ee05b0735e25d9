"""A whole run of the trainer on the fake engine, in a directory, as the workflow drives it."""

from dataclasses import dataclass, field
from pathlib import Path

from tests.support.fake_engine import CountingData, FakeSession, validation_batches

from finetune.core.events import CheckpointSaved, Event, StepCompleted
from finetune.core.paths import RunPaths
from finetune.training.checkpoints import Checkpoints, read_state
from finetune.training.plan import TrainingPlan
from finetune.training.schedules import cosine
from finetune.training.signals import StopRequest
from finetune.training.trainer import Outcome, Trainer
from finetune.training.validation import SampleAnswer, Validation


def plan(total_steps=20, *, eval_steps=5, checkpoint_steps=4, patience=None, threshold=0.0, peak=0.3):
    return TrainingPlan(
        total_steps=total_steps,
        steps_per_epoch=8,
        warmup_steps=2,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        schedule=cosine(peak, warmup_steps=2, total_steps=total_steps),
        patience=patience,
        threshold=threshold,
    )


def validation() -> Validation:
    return Validation(
        batches=validation_batches, answers=lambda generator: iter([SampleAnswer("1 2 3", "4", str(generator is None))])
    )


@dataclass
class FakeRun:
    """Runs the trainer in `root`; `events` are all that it told, over all parts of the run."""

    root: Path
    plan: TrainingPlan = field(default_factory=plan)
    keep: int = 3
    validation: Validation | None = field(default_factory=validation)
    stop: StopRequest = field(default_factory=StopRequest)
    events: list[Event] = field(default_factory=list)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(RunPaths(self.root), self.keep)

    def go(self, session=None, *, listener=None) -> Outcome:
        """Start, or go on from the latest checkpoint that is whole."""
        session = session or FakeSession()
        self.root.mkdir(exist_ok=True)
        self.checkpoints.clean()
        latest = self.checkpoints.latest(lambda _message: None)
        state = None
        if latest is not None:
            session.load_state(latest)
            state = read_state(latest)
            self.checkpoints.rewind(state.step, best_step=state.best_step)

        def emit(event: Event) -> None:
            self.events.append(event)
            if listener is not None:
                listener(event)

        return Trainer(
            session,
            self.plan,
            CountingData(),
            validation=self.validation,
            checkpoints=self.checkpoints,
            emit=emit,
            stop=self.stop,
            state=state,
        ).run()

    def curve(self) -> list[tuple[int, float, float]]:
        """(step, loss, learning rate); of a step that was done twice, the last time."""
        steps = [event for event in self.events if isinstance(event, StepCompleted)]
        return list({event.step: (event.step, event.loss, event.learning_rate) for event in steps}.values())

    def saved_steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, CheckpointSaved)]

    def final_bytes(self) -> dict[str, bytes]:
        folder = RunPaths(self.root).checkpoint(self.plan.total_steps)
        return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors")}

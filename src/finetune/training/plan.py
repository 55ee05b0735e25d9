"""How long a run is and what happens when: the numbers of the configuration, with every default worked out."""

import math
from dataclasses import dataclass

from finetune.config.schema import OutputConfig, TrainingConfig
from finetune.training.schedules import Schedule, make_schedule

DEFAULT_EPOCHS = 3.0
WARMUP_SHARE = 0.05
MOST_WARMUP_STEPS = 100
EVALUATIONS_A_RUN = 10


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The numbers that the loop follows. Steps count from 1 where they are done, from 0 where they are planned."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    eval_steps: int
    checkpoint_steps: int
    schedule: Schedule
    patience: int | None
    threshold: float
    notices: tuple[str, ...] = ()

    def evaluates_at(self, step: int) -> bool:
        """Before the first step, every `eval_steps`, and at the end."""
        return step % self.eval_steps == 0 or step == self.total_steps

    @property
    def evaluations(self) -> int:
        """How many there are, where nothing stops the run."""
        return math.ceil(self.total_steps / self.eval_steps) + 1

    def saves_at(self, step: int) -> bool:
        """Every `checkpoint_steps`, and at the end. A new best is saved besides."""
        return step % self.checkpoint_steps == 0 or step == self.total_steps


def make_plan(training: TrainingConfig, output: OutputConfig, *, steps_per_epoch: int) -> TrainingPlan:
    """Work out the plan for a data set that takes `steps_per_epoch` steps. `notices` say what was inferred."""
    notices: list[str] = []
    total = _total_steps(training, steps_per_epoch, notices)
    warmup = _warmup_steps(training, total, notices)
    eval_steps = output.eval_steps or math.ceil(total / EVALUATIONS_A_RUN)
    if output.eval_steps is None:
        notices.append(f"output.eval_steps={eval_steps}: a tenth of the run.")
    return TrainingPlan(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup,
        eval_steps=eval_steps,
        checkpoint_steps=output.checkpoint_steps or eval_steps,
        schedule=make_schedule(
            training.schedule,
            training.learning_rate,
            warmup_steps=warmup,
            total_steps=total,
            floor=training.min_learning_rate,
        ),
        patience=training.early_stopping_patience,
        threshold=training.early_stopping_threshold,
        notices=tuple(notices),
    )


def _total_steps(training: TrainingConfig, steps_per_epoch: int, notices: list[str]) -> int:
    """The first limit that is reached of `epochs` (parts of one allowed) and `max_steps`."""
    if training.epochs is None and training.max_steps is not None:
        return training.max_steps
    epochs = DEFAULT_EPOCHS if training.epochs is None else training.epochs
    # 1e-9: 0.1 epochs of 30 steps are 3 steps, although 0.1 * 30 is a little more than 3 in floating point.
    by_epochs = max(1, math.ceil(epochs * steps_per_epoch - 1e-9))
    if training.epochs is None:
        notices.append(f"training.epochs={epochs:g}, the default: {by_epochs:,} steps.")
    if training.max_steps is not None and training.max_steps < by_epochs:
        notices.append(f"training.max_steps={training.max_steps:,} ends the run before {epochs:g} epochs are done.")
    return min(by_epochs, training.max_steps or by_epochs)


def _warmup_steps(training: TrainingConfig, total: int, notices: list[str]) -> int:
    if training.warmup_steps is not None:
        if training.warmup_steps >= total:
            notices.append(
                f"training.warmup_steps={training.warmup_steps:,} is not less than the run's {total:,} steps: "
                f"the learning rate never reaches its peak."
            )
        return training.warmup_steps
    inferred = min(MOST_WARMUP_STEPS, round(total * WARMUP_SHARE))
    notices.append(f"training.warmup_steps={inferred}: 5 % of the steps, at most {MOST_WARMUP_STEPS}.")
    return inferred

"""Where a run stands, as one value. `state.json` of a checkpoint holds it, and nothing else is needed to go on.

The step is also the position in the data, in the schedule and in the dropout stream: all three are pure functions
of it. Floats survive JSON exactly, because Python writes the shortest text that reads back as the same number.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from finetune.core.errors import CheckpointError
from finetune.core.types import LossSum, StepResult


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Step, counters, best metric, early stopping. Steps that are skipped (not finite) count as steps."""

    step: int = 0  # optimizer steps done
    skipped: int = 0
    consecutive_skipped: int = 0
    tokens_processed: int = 0  # real tokens that were read, without padding
    tokens_trained: int = 0  # tokens whose loss counted
    step_seconds: float = 0.0  # time of the steps alone
    elapsed_seconds: float = 0.0  # time of everything, over all parts of the run
    peak_memory_bytes: int = 0
    last_loss: float | None = None  # of the last step that was applied
    evaluated_step: int = -1  # the last step whose evaluation is complete; -1: none
    evaluations_without_improvement: int = 0
    reference_loss: float | None = None  # what early stopping compares with
    initial_eval_loss: float | None = None
    final_eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_accuracy: float | None = None
    best_step: int | None = None

    def after_step(self, result: StepResult, *, tokens: int, trained_tokens: int, seconds: float) -> "TrainingState":
        """The state once a step is done; `tokens` are its real tokens, `seconds` its wall time."""
        skipped = 0 if result.applied else 1
        return replace(
            self,
            step=self.step + 1,
            skipped=self.skipped + skipped,
            consecutive_skipped=self.consecutive_skipped + 1 if skipped else 0,
            tokens_processed=self.tokens_processed + tokens,
            tokens_trained=self.tokens_trained + (0 if skipped else trained_tokens),
            step_seconds=self.step_seconds + seconds,
            last_loss=self.last_loss if skipped else result.loss,
        )

    def after_evaluation(self, outcome: LossSum, *, threshold: float) -> "TrainingState":
        """The state once the validation rows were read at this step.

        The evaluation before the first step is the yardstick, never the best: a run's best checkpoint is one
        that it trained. Patience counts evaluations that are not better than the reference by `threshold`.
        """
        loss = outcome.mean
        seen = replace(self, evaluated_step=self.step, final_eval_loss=loss)
        if self.step == 0:
            return replace(seen, initial_eval_loss=loss)
        if _lower(loss, self.best_eval_loss):
            seen = replace(seen, best_eval_loss=loss, best_accuracy=outcome.accuracy, best_step=self.step)
        if _lower(loss + threshold, self.reference_loss):
            return replace(seen, reference_loss=loss, evaluations_without_improvement=0)
        return replace(seen, evaluations_without_improvement=self.evaluations_without_improvement + 1)

    def to_json(self) -> str:
        """The text of `state.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainingState":
        """Read `state.json` back. Raises CheckpointError where it is not one of ours."""
        try:
            document: dict[str, Any] = json.loads(text)
            known = {field.name for field in fields(cls)}
            if not isinstance(document, dict) or set(document) != known:
                raise ValueError(f"its keys are not {sorted(known)}")
            return cls(**document)
        except ValueError as error:
            raise CheckpointError(f"state.json of the checkpoint cannot be read: {error}") from error


def _lower(loss: float, than: float | None) -> bool:
    return math.isfinite(loss) and (than is None or loss < than)

"""`report.json`: what a run did, in figures that scripts rely on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.core.types import ParameterCount
from finetune.data.report import RowCounts
from finetune.evaluation.metrics import perplexity
from finetune.training.state import TrainingState

BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the report says besides the state: things that do not change while a run goes on."""

    engine: str
    method: str
    model: str
    run_dir: str
    steps_per_epoch: int
    parameters: ParameterCount
    rows: RowCounts
    validation_rows: int
    memory: Mapping[str, Any]  # predicted and observed peak in bytes, and the parts of the prediction


def make_report(state: TrainingState, facts: RunFacts, *, reason: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The document. `result` says where the weights are and of which step; losses are in nats per trained token.

    `tokens_per_second` is real tokens (no padding) over the time of the steps alone. `final_loss` is the training
    loss of the last step; `perplexity` is exp of the result's evaluation loss, or of `final_loss` where nothing
    was evaluated.
    """
    loss = state.last_loss if state.best_eval_loss is None else state.best_eval_loss
    return {
        "engine": facts.engine,
        "method": facts.method,
        "model": facts.model,
        "run_dir": facts.run_dir,
        "steps": state.step,
        "epochs": round(state.step / facts.steps_per_epoch, 4),
        "tokens_processed": state.tokens_processed,
        "tokens_trained": state.tokens_trained,
        "tokens_per_second": state.tokens_processed / state.step_seconds if state.step_seconds else 0.0,
        "initial_eval_loss": state.initial_eval_loss,
        "best_eval_loss": state.best_eval_loss,
        "final_eval_loss": state.final_eval_loss,
        "final_loss": state.last_loss,
        "perplexity": None if loss is None else perplexity(loss),
        "accuracy": state.best_accuracy,
        "training_time_seconds": state.elapsed_seconds,
        "peak_memory_gb": state.peak_memory_bytes / BYTES_PER_GB,
        "memory": dict(facts.memory),
        "parameters": asdict(facts.parameters),
        "rows": asdict(facts.rows),
        "validation_rows": facts.validation_rows,
        "skipped_steps": state.skipped,
        "finish_reason": reason,
        "result": dict(result),
    }

"""Going on with a run: is it still the same run, and where does it stand."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.load import load_config
from finetune.core.errors import CheckpointError, UsageError
from finetune.core.paths import RunPaths
from finetune.tracking.metrics_log import cut_after
from finetune.training.checkpoints import Checkpoints, Warn, read_state
from finetune.training.compatibility import config_differences, fact_differences
from finetune.training.state import TrainingState
from finetune.workflows.preparation import Preparation
from finetune.workflows.record import identity_of, read_record, run_record


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A checkpoint that is whole, and the state in it."""

    checkpoint: Path
    state: TrainingState


def refuse_changes(paths: RunPaths, prepared: Preparation) -> list[str]:
    """Compare with what the run was started with; return warnings about versions and device.

    Raises UsageError where the configuration differs in a way that changes the steps, CheckpointError where
    data, template, tokenizer or model files differ.
    """
    started, now = read_record(paths), _as_json(run_record(prepared))
    changed = config_differences(load_config(paths.config, environ={}).config, prepared.config)
    if changed:
        raise UsageError(_refusal(paths, changed, "Take them back, or start a new run with another --output."))
    changed = fact_differences(identity_of(started), identity_of(now))
    if changed:
        raise CheckpointError(_refusal(paths, changed, "Put them back as they were, or start a new run."))
    others = fact_differences(started["versions"], now["versions"])
    others += fact_differences(started["engine"], now["engine"], of="engine")
    if not others:
        return []
    return [f"Not the same surroundings as before, so the result may not be the same bit for bit: {'; '.join(others)}."]


def find_starting_point(
    paths: RunPaths, checkpoints: Checkpoints, chosen: Path | None, warn: Warn
) -> StartingPoint | None:
    """The chosen checkpoint or the latest whole one; None where the run stopped before its first.

    Raises CheckpointError where the chosen one is not whole.
    """
    checkpoint = chosen or checkpoints.latest(warn)
    if checkpoint is None:
        warn(f"{paths.root} has no whole checkpoint: the run begins again.")
        return None
    return StartingPoint(checkpoint, read_state(checkpoint))


def rewind(paths: RunPaths, checkpoints: Checkpoints, start: StartingPoint | None) -> None:
    """Make the run's files say what they said at the starting point, so that each step stands in them once."""
    state = start.state if start is not None else TrainingState(step=-1)
    checkpoints.rewind(state.step, best_step=state.best_step)
    cut_after(paths.metrics, step=state.step, evaluated_step=state.evaluated_step)


def _refusal(paths: RunPaths, changed: list[str], cure: str) -> str:
    return "\n".join([f"{paths.root} cannot go on, because this differs:", *(f"  {line}" for line in changed), cure])


def _as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it comes back from a file: tuples as lists, keys as text."""
    return dict(json.loads(json.dumps(record)))

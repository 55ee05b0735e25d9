"""`ft demo`: the main job on the carried model and data, measured on rows that neither training saw."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import UsageError
from finetune.core.events import Listener
from finetune.core.files import write_atomically
from finetune.core.paths import RunPaths
from finetune.demo.data import DATA
from finetune.tracking.metrics_log import to_text
from finetune.workflows.evaluate import EvaluationResult, evaluate
from finetune.workflows.train import TrainingResult, train

OUTPUT = Path("outputs/demo")
MODEL = "demo"
SHOWN = 4
EVAL_STEPS = 94  # half of the 188 steps
TRAINING: Mapping[str, Any] = {
    "learning_rate": 4e-3,  # a model this small takes ten times what a large one does
    "batch_size": 8,
    "epochs": 1,
    "schedule": "linear",
    "seed": 7,
}

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoRow:
    """A request with the call that answers it."""

    request: str
    call: str


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The run, and base beside tuned model on the test rows."""

    run: TrainingResult
    comparison: EvaluationResult
    report: Mapping[str, Any]  # what report.json holds
    seconds: float


def demo_rows(split: str, count: int) -> list[DemoRow]:
    """The first rows of a split: `train`, `validation` or `test`."""
    with (DATA / f"{split}.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line, _ in zip(lines, range(count), strict=False)]
    return [DemoRow(messages[0]["content"], messages[1]["content"]) for messages in rows]


def base_answers(backend: str = "auto") -> EvaluationResult:
    """What the base says to a few test rows before any tuning."""
    return evaluate(model=MODEL, data=DATA / "test.jsonl", limit=SHOWN, generate=SHOWN, backend=backend)


def tune_and_compare(
    output: Path = OUTPUT,
    *,
    backend: str = "auto",
    began: float,
    listeners: Sequence[Listener] = (),
    on_notice: OnNotice = lambda _message: None,
) -> DemoResult:
    """Tune the demo model into `output`, then measure base and tuned model on all test rows.

    A former demo in `output` is replaced; anything else there is refused. `began` is a `time.perf_counter()`: the
    report's `seconds` count from it.
    """
    require_room(output)
    _make_room(output, on_notice)
    run = train(_config(output, backend), listeners=listeners)
    test = DATA / "test.jsonl"
    with test.open(encoding="utf-8") as lines:
        rows = sum(1 for _ in lines)
    comparison = evaluate(run.run_dir, data=test, generate=rows)
    return _with_report(run, comparison, time.perf_counter() - began)


def _config(output: Path, backend: str) -> dict[str, dict[str, Any]]:
    return {
        "model": {"name": MODEL, "backend": backend},
        "data": {"train_file": str(DATA / "train.jsonl"), "validation_file": str(DATA / "validation.jsonl")},
        "training": dict(TRAINING),
        "output": {"output_dir": str(output), "sample_prompts": 1, "eval_steps": EVAL_STEPS},
    }


def _with_report(run: TrainingResult, comparison: EvaluationResult, seconds: float) -> DemoResult:
    tuned = comparison.tuned.exact_match if comparison.tuned else None
    matches = {"base": comparison.base.exact_match, "tuned": tuned}
    report = {**run.metrics, "exact_match": matches, "seconds": seconds}
    write_atomically(RunPaths(run.run_dir).report, to_text(report))
    return DemoResult(run, comparison, report, seconds)


def require_room(output: Path) -> None:
    """Refuse a directory that holds another run than a former demo."""
    paths = RunPaths(output)
    if paths.run_info.exists() and str(DATA / "train.jsonl") not in paths.config.read_text(encoding="utf-8"):
        raise UsageError(f"{output} holds another run than the demo's. Choose another directory with --output.")


def _make_room(output: Path, on_notice: OnNotice) -> None:
    """Delete a former demo. It is made again from the same seed, so nothing is lost."""
    if RunPaths(output).run_info.exists():
        on_notice(f"The former demo in {output} is replaced.")
        shutil.rmtree(output)

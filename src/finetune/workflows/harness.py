"""`ft harness`: the tasks of EleutherAI's lm-evaluation-harness on a tuned model, through its Hugging Face backend.

The harness gets one merged model in a temporary directory, with the template that the model was trained with, so it
reads what any other program would read of an export.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.core.errors import FinetuneError, UsageError
from finetune.core.files import write_atomically
from finetune.models.source import ModelSource
from finetune.workflows.export import export
from finetune.workflows.opening import resolve_base
from finetune.workflows.subjects import find_subject, is_run

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """What the harness is asked for."""

    tasks: tuple[str, ...]
    tasks_from: Path | None = None  # a directory of task files (YAML) beside its own
    limit: int | None = None  # of documents a task
    few_shot: int | None = None  # examples in front of a question; None: as the task says
    batch_size: int = 8
    chat_template: bool = False
    device: str | None = None  # as PyTorch names it; None: the harness chooses


@dataclass(frozen=True, slots=True)
class HarnessFigure:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    error: float | None  # standard error


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """The figures, and what they belong to."""

    subject: str
    version: str  # of the harness
    figures: tuple[HarnessFigure, ...]
    versions: dict[str, Any]  # of the tasks


def harness(
    what: Path | str | None,
    options: HarnessOptions,
    *,
    model: str | None = None,
    checkpoint: str | None = None,
    output: Path | None = None,
    on_notice: OnNotice = lambda _message: None,
) -> HarnessResult:
    """Measure a run, an adapter or a model on tasks; `output` gets all that the harness reports, as JSON.

    Raises UsageError where the harness is not installed or has no such task.
    """
    _check(options, output)
    evaluator, manager = _opened(options)
    with _as_one_model(what, model, checkpoint, on_notice) as directory:
        found = _run(evaluator, manager, directory, options)
    if output is not None:
        write_atomically(output, json.dumps(found, indent=2, default=str, ensure_ascii=False) + "\n")
    return HarnessResult(str(what or model), _version(), tuple(_figures(found["results"])), found["versions"])


def _check(options: HarnessOptions, output: Path | None) -> None:
    if not find_spec("lm_eval"):
        raise UsageError(
            "ft harness runs EleutherAI's lm-evaluation-harness, which is not installed. "
            "Install it with: pip install 'lm_eval[hf]'"
        )
    if not options.tasks:
        raise UsageError("--tasks is empty: name at least one, for example --tasks arc_easy,hellaswag.")
    for name, value in (("--limit", options.limit), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: give at least 1.")
    if options.few_shot is not None and options.few_shot < 0:
        raise UsageError(f"--few-shot {options.few_shot}: give 0 (none) or more.")
    if options.tasks_from is not None and not options.tasks_from.is_dir():
        raise UsageError(f"--tasks-from {options.tasks_from} is not a directory of task files.")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output {output}: the directory {output.parent} does not exist. Make it first.")


def _opened(options: HarnessOptions) -> tuple[Any, Any]:
    """The harness's evaluator and its tasks, all of which it has."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if options.tasks_from is None else str(options.tasks_from))
    unknown = [task for task in options.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(
            f"lm-evaluation-harness {_version()} has no task {', '.join(unknown)}. `lm-eval ls tasks` lists those that "
            "it has; --tasks-from takes a directory of your own."
        )
    return lm_eval, manager


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


@contextmanager
def _as_one_model(
    what: Path | str | None, model: str | None, checkpoint: str | None, on_notice: OnNotice
) -> Iterator[Path]:
    """A directory with everything that the harness loads: that of the model, or a merge that is gone afterwards."""
    if what is None:
        source = resolve_base(find_subject(None, model=model, adapter=None, checkpoint=checkpoint))
        if _is_packed(source):
            raise UsageError(
                f"--model {source.name}: its weights are packed for MLX, and the harness reads models with PyTorch. "
                "Give the model that they were made from; a run or an adapter on these is merged into a float model."
            )
        yield source.path
        return
    with TemporaryDirectory(prefix="ft-harness-") as folder:
        merged = Path(folder) / "model"
        packed = _is_packed(_base_of(Path(what), model, checkpoint))
        export(
            what,
            format="merged",
            output=merged,
            model=model,
            checkpoint=checkpoint,
            dequantize=packed,
            on_notice=on_notice,
        )
        yield merged


def _base_of(what: Path, model: str | None, checkpoint: str | None) -> ModelSource:
    run, adapter = (what, None) if is_run(what) else (None, what)
    return resolve_base(find_subject(run, model=model, adapter=adapter, checkpoint=checkpoint))


def _is_packed(source: ModelSource) -> bool:
    """Whether the files hold MLX's packed weights, which other programs do not read."""
    return isinstance(source.config.get("quantization"), dict)


def _run(evaluator: Any, manager: Any, directory: Path, options: HarnessOptions) -> dict[str, Any]:
    try:
        found = evaluator.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(directory)},
            tasks=list(options.tasks),
            task_manager=manager,
            num_fewshot=options.few_shot,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device,
            apply_chat_template=options.chat_template,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise FinetuneError(f"lm-evaluation-harness stopped: {type(error).__name__}: {error}") from error
    return dict(found)


def _figures(results: dict[str, dict[str, Any]]) -> Sequence[HarnessFigure]:
    """Metrics are called `name,filter`, and their standard errors `name_stderr,filter`."""
    figures = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                label = metric if kind == "none" else f"{metric} ({kind})"
                figures.append(HarnessFigure(task, label, float(value), error if isinstance(error, float) else None))
    return figures

"""What a person means by a run, a model, an adapter or a checkpoint: the base, and what was trained on it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.store import is_adapter, named_base
from finetune.config.load import load_config
from finetune.config.schema import ModelConfig, RunConfig
from finetune.core.errors import CheckpointError, ModelError, UsageError
from finetune.core.paths import ADAPTER_CONFIG, RunPaths
from finetune.workflows.record import read_record


@dataclass(frozen=True, slots=True)
class Run:
    """A finished or stopped run on disk."""

    paths: RunPaths
    config: RunConfig
    info: Mapping[str, Any]  # run.json

    @property
    def template(self) -> str:
        """The template that the run trained with: a name, the path of a .jinja file, or Jinja text."""
        return self.config.data.template or str(self.info["template"]["name"])


@dataclass(frozen=True, slots=True)
class Subject:
    """A base model and, at most, one thing trained on it: an adapter, or a whole model (full fine-tuning)."""

    model: ModelConfig
    adapter: Path | None = None
    tuned_model: Path | None = None
    checkpoint: str | None = None  # what was chosen: "adapter", "model", "best", "last (step 40)", "step 40"
    run: Run | None = None

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything beside the base."""
        return self.adapter is not None or self.tuned_model is not None


def is_run(path: Path) -> bool:
    """Whether a directory is one that `ft train` wrote."""
    paths = RunPaths(path)
    return paths.config.is_file() and paths.run_info.is_file()


def open_run(path: Path) -> Run:
    """Read a run's configuration and facts. Raises UsageError for any other directory."""
    if not is_run(path):
        raise UsageError(
            f"{path} is not a run: {_what_is_there(path)}. Give the directory that `ft train` wrote "
            "(it holds config.yml and run.json), or --model and --adapter."
        )
    paths = RunPaths(path)
    return Run(paths, load_config(paths.config, environ={}).config, read_record(paths))


def find_subject(
    run: Path | None = None,
    *,
    model: str | None = None,
    adapter: Path | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
) -> Subject:
    """The model that RUN, --model, --adapter and --checkpoint describe together.

    A run may stand in each of the first three places; `backend` and `device` go before its own. Raises UsageError
    for combinations that contradict each other, and ModelError or CheckpointError for what is not there.
    """
    subject = _found(run, model, adapter, checkpoint)
    wanted = {"backend": backend, "device": device}
    where = {key: value for key, value in wanted.items() if value is not None}
    return replace(subject, model=subject.model.model_copy(update=where))


def _found(run: Path | None, model: str | None, adapter: Path | None, checkpoint: str | None) -> Subject:
    if model is not None and is_run(Path(model)):
        run, model = _only_one(run, Path(model), "--model"), None
    if adapter is not None and is_run(adapter):
        run, adapter = _only_one(run, adapter, "--adapter"), None
    if run is not None and adapter is not None:
        raise UsageError(f"Both a run ({run}) and an adapter ({adapter}) are given. Give one of them.")
    if run is not None:
        subject = _of_run(open_run(run), checkpoint)
        return subject if model is None else _on_another_base(subject, model)
    if adapter is not None:
        return _of_adapter(adapter if checkpoint is None else _mlx_checkpoint(adapter, checkpoint), model)
    if checkpoint is not None:
        raise UsageError(f"--checkpoint {checkpoint} needs a run to choose from. Give the run's directory.")
    if model is None:
        raise UsageError("Nothing to load. Give a run's directory, or --model (and --adapter).")
    return Subject(ModelConfig(name=model))


def _only_one(run: Path | None, other: Path, option: str) -> Path:
    if run is not None and run != other:
        raise UsageError(f"Two runs are given: {run}, and {other} by {option}. Give one of them.")
    return other


def _of_run(run: Run, checkpoint: str | None) -> Subject:
    full = run.config.training.method == "full"
    if checkpoint is None:
        path, chosen = _result(run)
    else:
        path, chosen = _checkpoint(run, checkpoint)
    place: dict[str, Path] = {"tuned_model" if full else "adapter": path}
    return Subject(run.config.model, checkpoint=chosen, run=run, **place)


def _on_another_base(subject: Subject, model: str) -> Subject:
    if subject.tuned_model is not None:
        raise UsageError(f"--model {model}: the run tuned every weight, so it has no adapter for another base.")
    return replace(subject, model=subject.model.model_copy(update={"name": model}))


def _result(run: Run) -> tuple[Path, str]:
    """What the run left as its result; a stopped run has only checkpoints."""
    paths = run.paths
    result = paths.model if run.config.training.method == "full" else paths.adapter
    if result.is_dir():
        return result, result.name
    return _checkpoint(run, "best" if paths.best.is_dir() else "last")


def _checkpoint(run: Run, wanted: str) -> tuple[Path, str]:
    """The directory of `best`, `last` or a step, and how to call it."""
    paths = run.paths
    steps = sorted(
        int(path.name[5:]) for path in paths.checkpoints.glob("step-*") if re.fullmatch(r"\d+", path.name[5:])
    )
    if wanted == "best" and paths.best.is_dir():
        return paths.best.resolve(), f"best ({_named(paths.best.resolve())})"
    if wanted == "last" and steps:
        return paths.checkpoint(steps[-1]), f"last ({_named(paths.checkpoint(steps[-1]))})"
    if wanted.isdecimal() and int(wanted) in steps:
        return paths.checkpoint(int(wanted)), _named(paths.checkpoint(int(wanted)))
    there = [*(["best"] if paths.best.is_dir() else []), *(["last"] if steps else []), *map(str, steps)]
    raise CheckpointError(
        f"{paths.root} has no checkpoint {wanted!r}. "
        + (f"There are: {', '.join(there)}." if there else "It has none: the run stopped before its first one.")
    )


def _named(checkpoint: Path) -> str:
    return f"step {int(checkpoint.name.removeprefix('step-'))}"


def _of_adapter(adapter: Path, model: str | None) -> Subject:
    if not is_adapter(adapter):
        raise ModelError(f"No adapter at {adapter}: {_what_is_there(adapter)}. An adapter has {ADAPTER_CONFIG}.")
    home = next((parent for parent in list(adapter.resolve().parents)[:2] if is_run(parent)), None)
    run = None if home is None else open_run(home)
    if model is not None:
        base = ModelConfig(name=model) if run is None else run.config.model.model_copy(update={"name": model})
    elif run is not None:
        base = run.config.model
    else:
        base = ModelConfig(name=_base_of(adapter))
    return Subject(base, adapter=adapter, run=run)


def _mlx_checkpoint(adapter: Path, wanted: str) -> Path:
    """One of the checkpoints that mlx-lm keeps beside its result, by its step."""
    there = {int(file.name[:7]): file for file in sorted(adapter.glob("[0-9]" * 7 + "_adapters.safetensors"))}
    if not there:
        raise UsageError(f"--checkpoint {wanted} needs a run to choose from. Give the run's directory.")
    if not wanted.isdecimal() or int(wanted) not in there:
        raise UsageError(f"{adapter} has no checkpoint {wanted!r}. There are: {', '.join(map(str, there))}.")
    return there[int(wanted)]


def _base_of(adapter: Path) -> str:
    """The base that the adapter's own configuration names."""
    name = named_base(adapter)
    if not name:
        raise UsageError(f"{adapter} names no base model. Give it with --model.")
    return name


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "nothing is there"
    if not path.is_dir():
        return "it is a file"
    names = sorted(child.name for child in path.iterdir())
    return f"it holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "it is empty"

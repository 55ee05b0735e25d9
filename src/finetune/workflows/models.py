"""List the models on this machine, and describe one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.errors import ModelError, UsageError
from finetune.engines.registry import choose
from finetune.hub import cache
from finetune.models.architecture import Architecture, read_architecture
from finetune.models.info import ModelInfo, describe_model, stored_dtype
from finetune.models.source import DEMO, DEMO_DIRECTORY, resolve_model
from finetune.planning.memory import MemoryPlan, plan_memory
from finetune.planning.runs import Surroundings, planned_run
from finetune.planning.steps import BatchSize

ROWS, LENGTH = 4, 512  # of the steps whose peak is told with a model


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of the list. `problem` says why a model cannot be used; its figures are then unknown."""

    name: str
    origin: str  # carried, cache or directory
    path: str
    model_type: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    context_length: int | None = None
    problem: str | None = None


def list_models(directories: Sequence[Path] = ()) -> tuple[ListedModel, ...]:
    """The carried model, the Hugging Face cache, and what lies in the given directories.

    Raises UsageError for a directory that does not exist.
    """
    missing = [str(directory) for directory in directories if not directory.is_dir()]
    if missing:
        raise UsageError(f"There is no directory {' or '.join(missing)}. Give directories that hold models.")
    return tuple(_listed(name, origin) for name, origin in _found(directories))


def _found(directories: Sequence[Path]) -> Iterator[tuple[str, str]]:
    if DEMO_DIRECTORY.is_dir():
        yield DEMO, "carried"
    for name in cache.model_names():
        yield name, "cache"
    for directory in directories:
        children = [directory] if (directory / "config.json").is_file() else sorted(directory.iterdir())
        for child in children:
            if (child / "config.json").is_file():
                yield str(child), "directory"


def _listed(name: str, origin: str) -> ListedModel:
    try:
        info = describe_model(resolve_model(name))
    except ModelError as error:
        return ListedModel(name, origin, path="", problem=str(error))
    return ListedModel(
        name=name,
        origin=origin,
        path=str(info.source.path),
        model_type=info.source.model_type,
        parameters=info.parameters,
        bytes=info.weight_bytes,
        context_length=info.source.context_length,
    )


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """What the files of one model say, and the peaks of tuning it (`TUNED`); None where its sizes are not known."""

    info: ModelInfo
    memory: Mapping[str, MemoryPlan] | None  # by method


def model_info(name: str, *, rank: int) -> DescribedModel:
    """Everything that the files of one model say. Raises ModelError."""
    info = describe_model(resolve_model(name))
    architecture = read_architecture(info.source.config)
    if architecture is None:
        return DescribedModel(info, None)
    methods = ("lora",) if info.bits else ("lora", "full")
    return DescribedModel(info, {method: _plan(info, architecture, method, rank) for method in methods})


def _plan(info: ModelInfo, architecture: Architecture, method: str, rank: int) -> MemoryPlan:
    """The peak in the type of the files, on the engine that would be chosen."""
    config = ModelConfig(name=info.source.name, dtype=stored_dtype(info.source.path))
    training = TrainingConfig.model_validate({"method": method, "batch_size": ROWS})
    run = planned_run(
        architecture,
        BatchSize(ROWS * LENGTH, ROWS * LENGTH, LENGTH, ROWS * LENGTH),
        Surroundings(stored_dtype(info.source.path), on_cpu=False),
        model=config,
        training=training,
        lora=LoraConfig(rank=rank),
        engine=choose(config).name,
    )
    return plan_memory(architecture, run)

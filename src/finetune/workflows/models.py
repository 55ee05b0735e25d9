"""List the models on this machine, and describe one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.core.errors import ModelError, UsageError
from finetune.hub import cache
from finetune.models.info import ModelInfo, describe_model
from finetune.models.source import DEMO, DEMO_DIRECTORY, resolve_model


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


def model_info(name: str) -> ModelInfo:
    """Everything that the files of one model say. Raises ModelError."""
    return describe_model(resolve_model(name))

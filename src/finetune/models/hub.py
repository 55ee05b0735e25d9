"""Which files of a repository on the hub make up a model, and which repositories are refused."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from finetune.core.errors import ModelError
from finetune.hub.client import HubFile, OnBytes, Repository, fetch, look_up
from finetune.models.source import refuse_own_code

CONFIG = "config.json"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
_BESIDE = (
    *("generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "spiece.model", "chat_template*", "*.jinja", "LICENSE*", "README.md"),
)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def look_up_model(name: str, revision: str | None = None) -> Repository:
    """The files that a model needs, weights last. Raises ModelError, also for what its list of files rules out."""
    found = look_up("model", name, revision)
    return found.only(_needed(name, sorted(file.name for file in found.files if "/" not in file.name)))


def fetch_model(model: Repository, *, on_bytes: OnBytes, check: Callable[[Path], None]) -> Path:
    """Bring the model into the cache and return its directory.

    One that asks for code to be run is refused before its weights arrive, and so is what `check` refuses, which gets
    the directory with all other files.
    """
    first_weights = next(file for file in model.files if _is_like(file.name, _WEIGHTS))

    def before(file: HubFile, directory: Path) -> None:
        if file == first_weights:
            refuse_own_code(model.name, directory)
            check(directory)

    return fetch(model, on_bytes=on_bytes, before=before)


def _needed(name: str, files: Sequence[str]) -> list[str]:
    if CONFIG not in files:
        raise ModelError(f"{name} has no {CONFIG}: it is not a model that can be tuned. Choose one in that format.")
    weights = [file for file in files if _is_like(file, _WEIGHTS)]
    pickled = [file for file in files if _is_like(file, _PICKLED)]
    if not weights and pickled:
        raise ModelError(
            f"{name} has its weights only as {', '.join(pickled)}. Such pickle files can run any program when opened, "
            "so they are not downloaded. Choose a model with safetensors, or convert them where you trust their origin."
        )
    if not weights:
        raise ModelError(f"{name} has no model*.safetensors. Choose a model in that format; GGUF cannot be tuned.")
    return [CONFIG, *(file for file in files if _is_like(file, _BESIDE)), *weights]


def _is_like(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)

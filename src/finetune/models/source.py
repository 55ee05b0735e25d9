"""From the name a person gives to a model directory that can be used: a local directory, `demo`, or the cache.

Nothing here touches the network, and nothing that a model directory contains is ever run.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import demo
from finetune.core.errors import ModelError
from finetune.core.files import read_json
from finetune.hub import cache
from finetune.models.configuration import require_plausible
from finetune.models.weights import INDEX, read_model_weights

DEMO = "demo"
DEMO_DIRECTORY = Path(demo.__file__).parent / "model"
# Any one of these is enough to build a tokenizer without running code of the model's authors.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
# Where transformers and mlx-lm find the names of Python files that a model brings.
_OWN_CODE = ("auto_map", "model_file")
VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size", "n_vocab")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A directory that was checked: what `config.json` says, and where it lies."""

    name: str  # as the person gave it
    path: Path
    config: Mapping[str, Any]
    model_type: str
    vocab_size: int
    context_length: int | None  # tokens; None where the architecture has no limit


def resolve_model(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find a model and check that it can be used. With `weights=False`, config.json and a tokenizer suffice.

    `demo` is the carried model; write `./demo` for a directory of that name. `revision` is a branch, tag or commit of
    a cached model; other names have none. Raises ModelError: nothing of that
    name, no config.json, no or damaged weights, only pickled weights, no tokenizer, code of its own (`auto_map`).
    """
    path = find_directory(name, revision)
    config = read_config(path)
    refuse_own_code(str(path), path)
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"{path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Copy it from where the model came from."
        )
    if weights:
        _require_weights(path)
    text = text_config(config)
    return ModelSource(
        name=name,
        path=path,
        config=config,
        model_type=str(config["model_type"]),
        vocab_size=_vocabulary(path, text),
        context_length=_first_number(text, CONTEXT_KEYS),
    )


def is_hub_model(name: str) -> bool:
    """Whether a name means a model of the hub: it is neither carried nor on the disk, and could be one."""
    return name != DEMO and not Path(name).expanduser().exists() and cache.is_hub_name(name)


def find_directory(name: str, revision: str | None = None) -> Path:
    """The directory that a name stands for, without a look at what is in it."""
    if not name.strip():
        raise ModelError(f"{name!r} is no name of a model. Give model.name: a directory, a cached model, or {DEMO}.")
    if revision is not None and not is_hub_model(name):
        raise ModelError(f"model.revision={revision}: {name} is not a model of the hub, so it has none. Leave it out.")
    if name == DEMO:
        if not DEMO_DIRECTORY.is_dir():
            raise ModelError(
                "This installation does not carry the demo model. Install finetune again, from a whole wheel."
            )
        return DEMO_DIRECTORY
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{name} is a file. A model is a directory with config.json, weights and a tokenizer: give {path.parent}."
        )
    if not cache.is_hub_name(name):
        near = _near(path) or f" Give a directory with config.json, the name of a cached model, or {DEMO}."
        raise ModelError(f"There is no model directory {name}.{near}")
    snapshot = cache.find_snapshot(name, revision)
    if snapshot is None:
        at = "" if revision is None else f" --revision {revision}"
        raise ModelError(
            f"{name} is neither a directory nor a model in the Hugging Face cache ({cache.location()}).{_near(path)} "
            f"Run `ft models pull {name}{at}` once, or give the path of a directory."
        )
    return snapshot


def _near(path: Path) -> str:
    """A sentence with directories beside the missing one, and cached models, of a similar name."""
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = [str(path.parent / match) for match in difflib.get_close_matches(path.name, beside, n=2)]
    near += difflib.get_close_matches(str(path), [DEMO, *cache.model_names()], n=2)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def read_config(path: Path) -> Mapping[str, Any]:
    """`config.json` of a model directory.

    Raises ModelError where it is missing, is not JSON, has no model_type, or says what no model can be.
    """
    file = path / "config.json"
    if not file.is_file():
        adapter = (
            " It looks like an adapter: give its base as the model." if (path / "adapter_config.json").is_file() else ""
        )
        raise ModelError(f"{path} is not a model directory: it has no config.json.{adapter}")
    config = _read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} has no model_type, so the architecture is unknown. Copy or download it again.")
    require_plausible(file, config)
    return config


def _read_json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}. Copy or download it again.") from error


def refuse_own_code(name: str, path: Path) -> None:
    """Raise ModelError where a model asks for Python of its authors to be run, which never happens here."""
    files = [path / file for file in ("config.json", "tokenizer_config.json")]
    contents = {file.name: _read_json(file) for file in files if file.is_file()}
    asking = [f"{key} in {file}" for file, content in contents.items() for key in _OWN_CODE if _has(key, content)]
    if asking:
        raise ModelError(
            f"{name} asks for code of its authors to be run ({' and '.join(asking)}), which never happens. "
            "Choose a conversion without it, or remove that from a copy if its architecture needs no such code."
        )


def _has(key: str, content: Any) -> bool:
    """At the top, or in the part of a model that is one of several, such as `text_config`."""
    if not isinstance(content, dict):
        return False
    return any(part.get(key) for part in (content, *content.values()) if isinstance(part, dict))


def _require_weights(path: Path) -> None:
    if (path / INDEX).is_file() or any(path.glob("model*.safetensors")):
        read_model_weights(path)
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    others = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("adapter"))
    if others:
        raise ModelError(
            f"{path} has no model*.safetensors, only {', '.join(others)}. Rename the weights to model.safetensors."
        )
    if pickled:
        raise ModelError(
            f"{path} has its weights only as {', '.join(pickled)}. Such pickle files can run any program when opened, "
            "so they are refused. Choose a model with safetensors, or convert them where you trust their origin."
        )
    how = "Copy or download them" if cache.commit_of(path) is None else "Run `ft models pull` for it again"
    raise ModelError(
        f"{path} has no weights (model.safetensors). {how}, or set model.init to random to start from nothing."
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model: models with images keep it in `text_config`."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _first_number(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    values = (config.get(key) for key in keys)
    return next(
        (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), None
    )


def _vocabulary(path: Path, config: Mapping[str, Any]) -> int:
    size = _first_number(config, VOCABULARY_KEYS)
    if size is None:
        raise ModelError(f"{path / 'config.json'} has no vocab_size. Add the number of rows of the model's embedding.")
    return size

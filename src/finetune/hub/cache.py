"""The Hugging Face cache, read only, through huggingface_hub's offline functions. `client` fills it."""

import re
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["model", "dataset"]


def is_hub_name(name: str) -> bool:
    """Whether a name could be one on the hub: `model` or `owner/model`."""
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and ".." not in name and not name.startswith((".", "-"))
    )


def location() -> Path:
    """Where the cache is (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_file(kind: Kind, name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a repository at a branch, tag or commit (None: the main branch), if it is in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def find_snapshot(name: str, revision: str | None = None) -> Path | None:
    """The cached directory of a model at a revision; None where it is not in the cache. Files may lack in it."""
    config = find_file("model", name, "config.json", revision)
    return None if config is None else config.parent


def commit_of(path: Path) -> str | None:
    """The commit that a directory of the cache holds; None for any other directory."""
    snapshots = path.parent
    return path.name if snapshots.name == "snapshots" and "--" in snapshots.parent.name else None


def model_names() -> tuple[str, ...]:
    """Names of all cached models."""
    folders = location().glob("models--*") if location().is_dir() else ()
    return tuple(sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders))

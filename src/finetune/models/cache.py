"""The Hugging Face cache, read only, through huggingface_hub's offline functions."""

import re
from pathlib import Path


def is_hub_name(name: str) -> bool:
    """Whether a name could be one on the hub: `model` or `owner/model`."""
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and ".." not in name and not name.startswith((".", "-"))
    )


def location() -> Path:
    """Where the cache is (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_snapshot(name: str) -> Path | None:
    """The cached directory of a model's main branch; None where it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def model_names() -> tuple[str, ...]:
    """Names of all cached models."""
    folders = location().glob("models--*") if location().is_dir() else ()
    return tuple(sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders))

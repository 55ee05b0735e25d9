"""Data sets on the hub: hf://datasets/owner/name[@revision][/path], and the files that such an address means."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune.core.errors import DataError
from finetune.data.blocks import SUFFIXES
from finetune.hub.client import OnBytes, Repository, fetch, look_up

SCHEME = "hf://"
_FORM = re.compile(r"(?:hf://datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+?))?/?")
_NOT_ROWS = frozenset({"readme.md", "license.txt", "license.md", "dataset_infos.json", "requirements.txt"})
_TRAIN = re.compile(r"(^|[/_.-])train([/_.-]|$)")


@dataclass(frozen=True, slots=True)
class DataAddress:
    """A repository, and a file or folder in it; no path means its training rows."""

    name: str
    revision: str | None
    path: str | None


def is_address(text: str) -> bool:
    """Whether a value of `data.train_file` means the hub."""
    return text.startswith(SCHEME)


def parse_address(text: str) -> DataAddress:
    """Raises DataError for what is no address of a data set."""
    found = _FORM.fullmatch(text)
    if found is None or ".." in text:
        raise DataError(
            f"{text} is not a data set on the hub. Write hf://datasets/owner/name or .../name@revision/path."
        )
    return DataAddress(found["name"], found["revision"], found["path"])


def look_up_data(address: DataAddress) -> Repository:
    """The data files that an address means, at the commit of now. Raises DataError where there are none."""
    found = look_up("dataset", address.name, address.revision)
    return found.only(_chosen(address, sorted(file.name for file in found.files)))


def fetch_data(repository: Repository, *, on_bytes: OnBytes) -> tuple[Path, ...]:
    """Bring the files into the cache; their paths there."""
    directory = fetch(repository, on_bytes=on_bytes)
    return tuple(directory / file.name for file in repository.files)


def _chosen(address: DataAddress, files: Sequence[str]) -> list[str]:
    """The file of the path, the files of its folder, or without a path those that are called train, or else all."""
    rows = [file for file in files if _holds_rows(file)]
    if address.path is not None:
        rows = [file for file in rows if file == address.path or file.startswith(f"{address.path}/")]
    elif any(_TRAIN.search(file) for file in rows):
        rows = [file for file in rows if _TRAIN.search(file)]
    if not rows:
        wanted = "no data file" if address.path is None else f"no data file {address.path}"
        raise DataError(f"{address.name} has {wanted}. It has: {', '.join(files[:20]) or 'no files'}.")
    return rows


def _holds_rows(file: str) -> bool:
    name = PurePosixPath(file).name.lower()
    return name not in _NOT_ROWS and name.removesuffix(".gz").endswith(SUFFIXES) and not name.startswith(".")

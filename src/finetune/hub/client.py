"""Files of repositories on the Hugging Face hub, brought into its cache whole, at one commit.

huggingface_hub's client downloads, goes on after a dropped connection and keeps the access token to itself. This
module sees that the files fit on the disk, and compares each with the hash that the hub gives. What goes wrong is
told without addresses that could hold a password.
"""

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.core.errors import DataError, FinetuneError, ModelError
from finetune.core.files import sha256_of
from finetune.hub import cache
from finetune.hub.cache import Kind

OnBytes = Callable[[int], None]  # bytes that have just arrived; negative where some come again

_ERRORS: dict[Kind, type[FinetuneError]] = {"model": ModelError, "dataset": DataError}
_NOUNS: dict[Kind, str] = {"model": "model", "dataset": "data set"}
_SPARE = 64 * 2**20  # bytes that stay free on the disk
_BLOCK = 2**20
_PATIENCE = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. One of the hashes is known: large files have a SHA-256, others git's id."""

    name: str  # with forward slashes
    size: int
    sha256: str | None
    git_id: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit, or those of its files that are wanted."""

    kind: Kind
    name: str
    revision: str | None  # as it was asked for; None: the main branch
    commit: str
    files: tuple[HubFile, ...]

    def only(self, names: Iterable[str]) -> "Repository":
        """The same with these files alone, in this order."""
        files = {file.name: file for file in self.files}
        return replace(self, files=tuple(files[name] for name in names))

    @property
    def bytes(self) -> int:
        """Of all files here."""
        return sum(file.size for file in self.files)

    def missing(self) -> tuple[HubFile, ...]:
        """Files that are not in the cache."""
        return tuple(
            file for file in self.files if cache.find_file(self.kind, self.name, file.name, self.commit) is None
        )

    def error(self, message: str) -> FinetuneError:
        """What went wrong with this repository."""
        return _ERRORS[self.kind](message)


def endpoint() -> str:
    """The hub's address (HF_ENDPOINT), without a user and password that may be in it."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def is_reachable() -> bool:
    """Whether the hub answers within a few seconds, whatever it says."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]
        return False
    return True


def look_up(kind: Kind, name: str, revision: str | None = None) -> Repository:
    """What a branch, tag or commit holds now. Raises ModelError or DataError with what to do."""
    from huggingface_hub import HfApi

    with _explained(kind, name, revision):
        info: Any = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    files = tuple(_file(sibling) for sibling in info.siblings or ())
    return Repository(kind, name, revision, str(info.sha), files)


def _file(sibling: Any) -> HubFile:
    large = sibling.lfs
    return HubFile(sibling.rfilename, sibling.size or 0, large.sha256 if large else None, sibling.blob_id)


def require_space(repository: Repository) -> None:
    """Refuse files that do not fit on the disk of the cache."""
    needed = sum(file.size for file in repository.missing())
    place = next(path for path in (cache.location(), *cache.location().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed + _SPARE > free:
        raise repository.error(
            f"{repository.name} needs {megabytes(needed)} more in {cache.location()}, and {megabytes(free)} are free. "
            "Make room, or set HF_HOME to a directory on another disk."
        )


def megabytes(number: int) -> str:
    """Bytes for a sentence."""
    return f"{number / 1e6:,.1f} MB"


def fetch(repository: Repository, *, on_bytes: OnBytes, before: Callable[[HubFile, Path], None] | None = None) -> Path:
    """Bring all files into the cache, check each, and return their directory.

    A file whose hash is wrong is fetched again once. Files that have arrived stay where a later one fails. `before`
    may refuse a file, knowing the directory of those before it. Raises ModelError or DataError.
    """
    require_space(repository)
    first, *others = repository.files
    # By its revision: the client then notes which commit that is, and finds it by that name when offline.
    path = _fetch_whole(replace(repository, commit=repository.revision or "main"), first, on_bytes)
    directory = Path(str(path).removesuffix(f"/{first.name}"))
    if directory.name != repository.commit:
        raise repository.error(f"{repository.name} has just been changed on the hub. Run the same command again.")
    for file in others:
        if before is not None:
            before(file, directory)
        _fetch_whole(repository, file, on_bytes)
    return directory


def _fetch_whole(repository: Repository, file: HubFile, on_bytes: OnBytes) -> Path:
    for again in (False, True):
        path = _download(repository, file, on_bytes, again=again)
        if _is_whole(path, file):
            return path
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    raise repository.error(
        f"{file.name} of {repository.name} arrived twice with other content than the hub's hash says, and was removed. "
        f"Something between here and {endpoint()} changes it, or the disk does. Try again, from another network."
    )


def _download(repository: Repository, file: HubFile, on_bytes: OnBytes, *, again: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with _explained(repository.kind, repository.name, repository.commit):
        path = hf_hub_download(
            repository.name,
            file.name,
            repo_type=repository.kind,
            revision=repository.commit,
            force_download=again,
            tqdm_class=_reporting(on_bytes),
        )
    return Path(path)


def _reporting(on_bytes: OnBytes) -> Any:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Reporting(tqdm):
        """Counts for somebody else and draws nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    return Reporting


def _is_whole(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return sha256_of(path) == file.sha256
    return file.git_id is None or _git_id(path) == file.git_id


def _git_id(path: Path) -> str:
    """The name that git gives to a file's content: SHA-1 of a header and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _explained(kind: Kind, name: str, revision: str | None) -> Iterator[None]:
    """The client's errors as ours, which say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        raise _ERRORS[kind](_explanation(kind, name, revision, _root(error))) from None


def _root(error: BaseException) -> BaseException:
    """What the client met, which it wraps in "not found in the cache" and the like."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError | ValueError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explanation(kind: Kind, name: str, revision: str | None, error: BaseException) -> str:
    from huggingface_hub import errors

    place, log_in = endpoint(), "log in with `hf auth login` (or set HF_TOKEN)"
    said: dict[type[BaseException], str] = {
        errors.OfflineModeIsEnabled: (
            f"{name} is not whole in the cache ({cache.location()}), and HF_HUB_OFFLINE forbids the hub. Unset it, or "
            "give a path on this machine."
        ),
        errors.GatedRepoError: (
            f"{name} is gated: its owner wants terms to be accepted first. Accept them at {place}/{_page(kind, name)}, "
            f"then {log_in} as the same user."
        ),
        errors.RepositoryNotFoundError: (
            f"There is no {_NOUNS[kind]} {name} at {place}, or it is private. Check the name; for a private one "
            f"{log_in}."
        ),
        errors.RevisionNotFoundError: f"{name} has no revision {revision}. Give a branch, a tag or a commit of it.",
        errors.EntryNotFoundError: f"A file of {name} is not there any more. Run the same command again.",
    }
    if isinstance(error, errors.HfHubHTTPError):
        answer = f"{place} answered {error.response.status_code} for {name}. Try again later, or check HF_TOKEN."
        return next((text for type_, text in said.items() if isinstance(error, type_)), answer)
    if isinstance(error, OSError) and error.errno is not None:
        return _disk_trouble(error)
    unreachable = (
        f"{place} cannot be reached for {name} ({type(error).__name__}). What has arrived whole is kept: check the "
        "connection and run the same command again."
    )
    return next((text for type_, text in said.items() if isinstance(error, type_)), unreachable)


def _disk_trouble(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return f"The disk of {cache.location()} is full. Make room, or set HF_HOME to a directory on another disk."
    return f"{cache.location()} cannot be written to ({error.strerror}). Set HF_HOME to a directory that can."


def _page(kind: Kind, name: str) -> str:
    return name if kind == "model" else f"datasets/{name}"

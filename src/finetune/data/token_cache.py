"""Encoded rows of large files, kept on disk between runs.

An entry is a directory named by everything that its rows depend on. It is written under another name, put on the disk,
and renamed: processes that write the same entry at once do not meet, and one that is killed leaves nothing that
counts. Entries that were not used for the longest time go when all together pass a limit.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.core.disk_cache import cache_limit
from finetune.core.errors import DataError
from finetune.core.files import is_temporary, sha256_of, sync, temporary_beside
from finetune.core.paths import cache_directory
from finetune.data.token_store import IDS_FILE, MASK_FILE, TABLE_FILE, DirectoryWriter, TokenStore, open_store

_MANIFEST, _LOCK = "entry.json", "lock"
_YOUNG = 60.0  # seconds in which a new entry gets its lock


def key_of(content: Mapping[str, Any]) -> str:
    """The name of the entry whose rows depend on `content`, plain JSON values, and on this code."""
    text = json.dumps({"code": _code(), **content}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:40]


@functools.cache
def _code() -> str:
    """Changes with the modules that decide what becomes of a row: nobody has to think of a version number."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    versions = [metadata.version(name) for name in ("tokenizers", "jinja2")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr(versions).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows that were found, and what else was written beside them."""

    store: TokenStore
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenCache:
    """The directory of all entries. `limit` in bytes."""

    root: Path
    limit: int

    def find(self, key: str) -> Entry | None:
        """The entry, if it is there and whole; one that is not is deleted."""
        place = self.root / key
        try:
            manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
            if not _is_whole(place, manifest):
                raise ValueError("not what was written")
            entry = Entry(open_store(place, manifest["ids"]), manifest["facts"])
            with contextlib.suppress(OSError):  # a cache that may only be read serves all the same
                os.utime(place / _MANIFEST)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self.remove(key)
            return None
        return entry

    def remove(self, key: str) -> None:
        """Delete an entry, whole or not. A process that reads it keeps what it has open."""
        self._discard(self.root / key)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator["_Unfinished"]:
        """A new entry, which counts from `_Unfinished.publish` on. Raises DataError where the disk does not take it."""
        unfinished: _Unfinished | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            unfinished = _Unfinished(self, key, temporary_beside(self.root / key))
            yield unfinished
        except OSError as error:
            raise DataError(
                f"{self.root}: the rows cannot be kept there ({error.strerror or error}). Large data is tokenised onto "
                "disk, one to two times its bytes. Make room, or name a directory with room in FT_CACHE_DIR."
            ) from error
        finally:
            if unfinished is not None:
                unfinished.close()

    def make_room(self, keep: str) -> None:
        """Delete the entries that were not used for the longest time until all fit the limit; `keep` stays."""
        entries = [found for place in self.root.iterdir() if (found := _use_of(place)) is not None]
        total = sum(size for _, size, _ in entries)
        for _, size, place in sorted(entries):
            if total > self.limit and place.name != keep:
                self._discard(place)
                total -= size

    def _discard(self, place: Path) -> None:
        """Take the name away first: what is half deleted must not look like an entry."""
        doomed = temporary_beside(place)
        with contextlib.suppress(OSError):
            place.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _clean(self) -> None:
        """Delete what killed processes left."""
        for place in self.root.iterdir():
            if is_temporary(place) and not _is_held(place / _LOCK):
                shutil.rmtree(place, ignore_errors=True)


class _Unfinished:
    """An entry that is being written."""

    def __init__(self, cache: TokenCache, key: str, directory: Path) -> None:
        self._cache = cache
        self._key = key
        self._directory = directory
        directory.mkdir()
        self._lock = (directory / _LOCK).open("wb")
        _hold(self._lock.fileno())
        self.writer = DirectoryWriter(directory)

    def publish(self, ids_type: str, facts: Mapping[str, Any]) -> Entry:
        """Put it on the disk and give it its name; where another process was first, that one's entry is it."""
        self.writer.close()
        _write_manifest(self._directory, ids_type, facts)
        with contextlib.suppress(OSError):  # there already: the same rows
            self._directory.rename(self._cache.root / self._key)
        sync(self._cache.root)
        entry = self._cache.find(self._key)
        if entry is None:
            raise DataError(f"{self._cache.root}: an entry vanished while it was written. Start again.")
        self._cache.make_room(self._key)
        return entry

    def close(self) -> None:
        """Delete it, unless it has its name by now."""
        with contextlib.suppress(OSError):
            self.writer.close()
        self._lock.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def token_cache() -> TokenCache:
    """The person's cache. FT_CACHE_GB is its limit; raises UsageError where that is no number."""
    return TokenCache(cache_directory() / "tokens", cache_limit())


def _write_manifest(directory: Path, ids_type: str, facts: Mapping[str, Any]) -> None:
    files = {name: (directory / name).stat().st_size for name in (TABLE_FILE, IDS_FILE, MASK_FILE)}
    manifest = {"ids": ids_type, "files": files, "table": sha256_of(directory / TABLE_FILE), "facts": facts}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, ensure_ascii=True)
    for name in files:
        sync(directory / name)
    (directory / _MANIFEST).write_text(text, encoding="utf-8")
    sync(directory / _MANIFEST)
    sync(directory)


def _is_whole(place: Path, manifest: dict[str, Any]) -> bool:
    """The manifest and the table by their hashes, the tokens by their size: each row has a checksum of its own."""
    stated = manifest.pop("sha256")
    sizes = {name: (place / name).stat().st_size for name in manifest["files"]}
    same: bool = stated == _digest(manifest) and sizes == manifest["files"]
    return same and bool(sha256_of(place / TABLE_FILE) == manifest["table"])


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()


def _use_of(place: Path) -> tuple[float, int, Path] | None:
    """When an entry was last used, and its bytes; None for what is none, or not any more."""
    try:
        last = (place / _MANIFEST).stat().st_mtime
        return None if is_temporary(place) else (last, sum(file.stat().st_size for file in place.iterdir()), place)
    except OSError:
        return None


def _hold(descriptor: int) -> None:
    """Lock a file until it is closed, or the process ends."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_held(lock: Path) -> bool:
    """Whether a living process holds the lock of an unfinished entry."""
    import fcntl

    try:
        with lock.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock: it was made this moment, or it is being deleted
        with contextlib.suppress(OSError):
            return time.time() - lock.parent.stat().st_mtime < _YOUNG
    return False

"""Directories on disk that can be made again, each named by everything that it depends on.

An entry is written under another name, synced, sealed by a manifest with the SHA-256 of its files, and renamed:
processes that make the same entry at once do not meet, and one that is killed leaves nothing that counts. Entries that
were not used for the longest time go when all together pass the limit.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import UsageError
from finetune.core.files import is_temporary, read_json, sha256_of, sync, temporary_beside

DEFAULT_GIGABYTES = 20.0
_MANIFEST = "entry.json"
_YOUNG = 60.0  # seconds in which a new entry gets its lock


def cache_limit() -> int:
    """The most bytes that one cache may hold: FT_CACHE_GB. Raises UsageError where that is no number."""
    given = os.environ.get("FT_CACHE_GB", str(DEFAULT_GIGABYTES))
    try:
        return int(float(given) * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(f"FT_CACHE_GB={given} is not a number of gigabytes. Give one, for example 20.") from None


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole entry."""

    path: Path
    bytes: int
    used: float  # seconds since the epoch
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DiskCache:
    """All entries below `root`, which need not be there yet; `limit` in bytes."""

    root: Path
    limit: int

    def find(self, key: str, *, on_damage: Callable[[Path], None]) -> Entry | None:
        """The entry, if it is there and every file has its hash; one that has not is deleted, and `on_damage` hears.

        What a reader has opened stays readable when another process deletes the entry.
        """
        place = self.root / key
        try:
            entry, hashes = _read(place)
            if any(sha256_of(place / name) != digest for name, digest in hashes.items()):
                raise ValueError("a file has changed")
            with contextlib.suppress(OSError):  # a cache that may only be read serves all the same
                os.utime(place / _MANIFEST)
        except FileNotFoundError:
            if not place.exists():
                return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        else:
            return entry
        _discard(place)
        on_damage(place)
        return None

    def add(self, key: str, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Make an entry of what `fill` writes into an empty directory. Raises what `fill` raises, and OSError.

        Where another process was first, its entry stays.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._clean()
        unfinished = temporary_beside(self.root / key)
        unfinished.mkdir()
        try:
            with _held(unfinished):
                fill(unfinished)
                _seal(unfinished, facts)
                with contextlib.suppress(FileExistsError, NotADirectoryError):
                    _publish(unfinished, self.root / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._make_room(key)

    def entries(self) -> list[Entry]:
        """What is there, the latest used first. Hashes are not compared."""
        found = []
        for place in self.root.iterdir() if self.root.is_dir() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found += [_read(place)[0]] if not is_temporary(place) else []
        return sorted(found, key=lambda entry: -entry.used)

    def _make_room(self, keep: str) -> None:
        total = 0
        for entry in self.entries():
            total += entry.bytes
            if total > self.limit and entry.path.name != keep:
                _discard(entry.path)

    def _clean(self) -> None:
        """Delete what killed processes left."""
        for place in self.root.iterdir():
            if is_temporary(place) and not _is_held(place):
                shutil.rmtree(place, ignore_errors=True)


def _seal(directory: Path, facts: Mapping[str, Any]) -> None:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    for file in files:
        sync(file)
    hashes = {file.name: sha256_of(file) for file in files}
    document = {"files": hashes, "bytes": sum(file.stat().st_size for file in files), "facts": facts}
    (directory / _MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sync(directory / _MANIFEST)
    sync(directory)


def _publish(unfinished: Path, place: Path) -> None:
    try:
        unfinished.rename(place)
    except OSError as error:
        if not place.is_dir():
            raise
        raise FileExistsError(place) from error
    sync(place.parent)


def _read(place: Path) -> tuple[Entry, Mapping[str, str]]:
    document = read_json(place / _MANIFEST)
    used = (place / _MANIFEST).stat().st_mtime
    return Entry(place, int(document["bytes"]), used, dict(document["facts"])), dict(document["files"])


def _discard(place: Path) -> None:
    """Take the name away first: what is half deleted must not look like an entry."""
    doomed = temporary_beside(place)
    with contextlib.suppress(OSError):
        place.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock that says: somebody is at work here. It vanishes with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_held(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return time.time() - directory.stat().st_mtime < _YOUNG  # made this moment, and not locked yet
        finally:
            os.close(descriptor)
    except BlockingIOError:
        return True
    except OSError:  # it is being deleted
        return True

"""Directories on disk that can be made again, each named by everything that it depends on.

An entry is written under another name, synced, sealed by a manifest that knows its files, and renamed: processes that
make the same entry at once do not meet, and one that is killed leaves nothing that counts. Entries that were not used
for the longest time go when all together pass the limit.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import UsageError
from finetune.core.files import is_temporary, read_json, sha256_of, sync, temporary_beside

DEFAULT_GIGABYTES = 20.0
_MANIFEST, _LOCK = "entry.json", "lock"
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


class DiskCache:
    """All entries below `root`, which need not be there yet; `limit` in bytes."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        self._cleaned = False
        self._room = 0  # bytes of new entries until all are counted again: that takes a while where there are many

    def find(self, key: str, *, on_damage: Callable[[Path], None]) -> Entry | None:
        """The entry, if it is there and its files are what was written; else it is deleted, and `on_damage` hears.

        What a reader has opened stays readable when another process deletes the entry.
        """
        place = self.root / key
        try:
            entry, files = _read(place)
            if not all(file.is_in(place) for file in files):
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
        self.remove(key)
        on_damage(place)
        return None

    def remove(self, key: str) -> None:
        """Delete an entry, whole or not."""
        _discard(self.root / key)

    def add(self, key: str, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        """Make an entry of what `fill` writes into an empty directory. Raises what `fill` raises, and OSError."""
        with self.writing(key) as unfinished:
            fill(unfinished.directory)
            unfinished.publish(facts)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator["Unfinished"]:
        """A directory to write files into; it is an entry from `Unfinished.publish` on. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self._cleaned:
            self._clean()
            self._cleaned = True
        directory = temporary_beside(self.root / key)
        directory.mkdir()
        try:
            with _held(directory):
                yield Unfinished(self, key, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """What is there, the latest used first. Hashes are not compared."""
        found = []
        for place in self.root.iterdir() if self.root.is_dir() else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found += [_read(place)[0]] if not is_temporary(place) else []
        return sorted(found, key=lambda entry: -entry.used)

    def make_room(self, keep: str, added: int) -> None:
        """Delete what was not used for the longest time until all fit the limit; `keep`, of `added` bytes, stays.

        Half of the room that is left may be filled without another look: other processes fill it too.
        """
        self._room -= added
        if self._room >= 0:
            return
        total = 0
        for entry in self.entries():
            total += entry.bytes
            if total > self.limit and entry.path.name != keep:
                self.remove(entry.path.name)
        self._room = max(0, self.limit - total) // 2

    def _clean(self) -> None:
        """Delete what killed processes left."""
        for place in self.root.iterdir():
            if is_temporary(place) and not _is_held(place):
                shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An entry that is being written, in `directory`."""

    cache: DiskCache
    key: str
    directory: Path

    def publish(self, facts: Mapping[str, Any], *, by_size: Collection[str] = ()) -> None:
        """Make it the entry; where another process was first, that one's stays. Raises OSError.

        Of the files named in `by_size` only the size is compared later: whoever reads them has checks of their own.
        """
        added = _seal(self.directory, facts, by_size)
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            _publish(self.directory, self.cache.root / self.key)
        self.cache.make_room(self.key, added)


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A file as it was written. `sha256` None: it is known by its size."""

    name: str
    bytes: int
    sha256: str | None

    def is_in(self, place: Path) -> bool:
        file = place / self.name
        return file.stat().st_size == self.bytes and self.sha256 in (None, self.sha256 and sha256_of(file))


def _seal(directory: Path, facts: Mapping[str, Any], by_size: Collection[str]) -> int:
    """Write the manifest. Returns the bytes of the files."""
    files = []
    for path in sorted(path for path in directory.iterdir() if path.is_file() and path.name != _LOCK):
        sync(path)
        files.append(_Sealed(path.name, path.stat().st_size, None if path.name in by_size else sha256_of(path)))
    manifest = {"files": [asdict(file) for file in files], "facts": facts}
    document = {**manifest, "sha256": _digest(manifest)}
    (directory / _MANIFEST).write_text(json.dumps(document, indent=2), encoding="utf-8")
    sync(directory / _MANIFEST)
    sync(directory)
    return sum(file.bytes for file in files)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()


def _publish(unfinished: Path, place: Path) -> None:
    try:
        unfinished.rename(place)
    except OSError as error:
        if not place.is_dir():
            raise
        raise FileExistsError(place) from error
    sync(place.parent)


def _read(place: Path) -> tuple[Entry, list[_Sealed]]:
    """An entry by its manifest. Raises OSError, and ValueError, KeyError or TypeError for one that is damaged."""
    manifest = read_json(place / _MANIFEST)
    if manifest.pop("sha256") != _digest(manifest):
        raise ValueError("the manifest has changed")
    files = [_Sealed(**file) for file in manifest["files"]]
    used = (place / _MANIFEST).stat().st_mtime
    return Entry(place, sum(file.bytes for file in files), used, manifest["facts"]), files


def _discard(place: Path) -> None:
    """Take the name away first: what is half deleted must not look like an entry."""
    doomed = temporary_beside(place)
    with contextlib.suppress(OSError):
        place.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock that says: somebody is at work here. It vanishes with the process."""
    with (directory / _LOCK).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_held(directory: Path) -> bool:
    try:
        with (directory / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # made this moment, and without its lock yet; or it is being deleted
        with contextlib.suppress(OSError):
            return time.time() - directory.stat().st_mtime < _YOUNG
    return False

"""Encoded rows of large files, kept on disk between runs: entries named by everything that the rows depend on."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.core.disk_cache import DiskCache, Unfinished, cache_limit
from finetune.core.errors import DataError
from finetune.core.paths import cache_directory
from finetune.data.token_store import IDS_FILE, MASK_FILE, DirectoryWriter, TokenStore, open_store


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


class TokenCache:
    """The entries below `root`. `limit` in bytes."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self._cache = DiskCache(root, limit)

    def find(self, key: str) -> Entry | None:
        """The entry, if it is there and whole; one that is not is deleted."""
        entry = self._cache.find(key, on_damage=lambda _: None)
        if entry is None:
            return None
        try:
            return Entry(open_store(entry.path, entry.facts["ids"]), entry.facts["rows"])
        except FileNotFoundError:  # another process deletes it at this moment
            return None

    def remove(self, key: str) -> None:
        """Delete an entry, whole or not. A process that reads it keeps what it has open."""
        self._cache.remove(key)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator["UnfinishedRows"]:
        """A new entry, which counts from `publish` on. Raises DataError where the disk does not take it."""
        try:
            with self._cache.writing(key) as entry, DirectoryWriter(entry.directory) as writer:
                yield UnfinishedRows(self, entry, writer)
        except OSError as error:
            raise DataError(
                f"{self.root}: the rows cannot be kept there ({error.strerror or error}). Large data is tokenised onto "
                "disk, one to two times its bytes. Make room, or name a directory with room in FT_CACHE_DIR."
            ) from error


@dataclass(frozen=True, slots=True)
class UnfinishedRows:
    """An entry that is being written."""

    cache: TokenCache
    entry: Unfinished
    writer: DirectoryWriter

    def publish(self, ids_type: str, facts: Mapping[str, Any]) -> Entry:
        """Put it on the disk and give it its name; where another process was first, that one's entry is it.

        Each row has a checksum, so that tokens and masks need no hash.
        """
        self.writer.close()
        self.entry.publish({"ids": ids_type, "rows": facts}, by_size=(IDS_FILE, MASK_FILE))
        found = self.cache.find(self.entry.key)
        if found is None:
            raise DataError(f"{self.cache.root}: an entry vanished while it was written. Start again.")
        return found


def token_cache() -> TokenCache:
    """The person's cache. FT_CACHE_GB is its limit; raises UsageError where that is no number."""
    return TokenCache(cache_directory() / "tokens", cache_limit())

"""A cache of converted weights: quantising a base of some billion parameters takes minutes, reading it back seconds.

An entry depends on the model's files, on what was made of them, and on the library that made it. Files are told by
inode, size and the times of their last change: the kernel sets one of those (ctime) at every write, and no program can
set it back; reading all bytes to hash them would take as long as a good part of the conversion.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.disk_cache import DiskCache, cache_limit
from finetune.core.paths import cache_directory
from finetune.models.weights import weight_files

FORMAT = 1
# Smaller models are converted in a second or two.
LEAST_BYTES = 256_000_000


@dataclass(frozen=True, slots=True)
class Conversion:
    """What would be made of a model's files. `facts` are plain JSON values: bits, groups, type, library, device."""

    model: Path
    facts: Mapping[str, Any]
    cache: DiskCache

    @property
    def key(self) -> str:
        """The name of its entry."""
        text = json.dumps({"format": FORMAT, "files": _identities(self.model), **self.facts}, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:40]

    def find(self, say: Callable[[str], None]) -> Path | None:
        """The directory of the entry, whole; `say` hears that one is damaged."""
        damaged = lambda place: say(f"The converted weights in {place} were damaged and are made again.")  # noqa: E731
        found = self.cache.find(self.key, on_damage=damaged)
        return None if found is None else found.path

    def keep(self, size: int, fill: Callable[[Path], None], say: Callable[[str], None]) -> None:
        """Add the entry of about `size` bytes that `fill` writes. The run goes on where that fails: `say` hears why."""
        root = self.cache.root
        try:
            root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(root).free
            if free < 2 * size:
                say(f"The converted weights ({size / 1e6:,.0f} MB) are not kept: there is too little room in {root}.")
                return
            self.cache.add(self.key, fill, {"model": str(self.model), **self.facts})
        except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where a disk is full
            reason = error.strerror if isinstance(error, OSError) and error.errno != errno.EIO else str(error)
            say(f"The converted weights cannot be kept in {root} ({reason}); FT_CACHE_DIR names another directory.")


def conversion_of(model: Path, facts: Mapping[str, Any], size: int) -> Conversion | None:
    """The conversion, or None where it is not worth keeping: little to do, no entry would fit, or a cache of 0 GB."""
    cache = conversion_cache()
    return Conversion(model.resolve(), facts, cache) if LEAST_BYTES <= size <= cache.limit else None


def conversion_cache() -> DiskCache:
    """The person's cache of conversions. Raises UsageError as `cache_limit` does."""
    return DiskCache(cache_directory() / "conversions", cache_limit())


def _identities(model: Path) -> list[list[Any]]:
    """What tells that the files of a model are the same ones, unchanged."""
    files = [model / "config.json", *weight_files(model)]
    status = [(file.name, file.stat()) for file in files]
    return [[name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in status]

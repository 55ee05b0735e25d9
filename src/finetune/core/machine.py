"""What this process may use of the machine: cores and memory, with the limits of a container."""

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def cgroup(name: str) -> str | None:
    """A file of this container's control group, such as `memory.max`; None where there is none."""
    return _read(_CGROUP / name)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None


def usable_cores() -> int:
    """Cores that this process may use: affinity, and the quota of a container."""
    if not sys.platform.startswith("linux"):
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    parts = (cgroup("cpu.max") or "").split()
    if len(parts) == 2 and parts[0].isdigit() and int(parts[1]):
        cores = min(cores, max(1, int(parts[0]) // int(parts[1])))
    return cores


def allow_open_files(more: int) -> bool:
    """Let this process hold `more` files open beside those that it has; False where the system forbids it.

    macOS allows 256, and most of Linux 1,024, until a process asks for more.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sum(1 for _ in Path("/dev/fd").iterdir()) + more
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
        except (ValueError, OSError):
            return False
    return True


class _Group(NamedTuple):
    """Bytes of a control group."""

    limit: int
    used: int


class _Version(NamedTuple):
    """What the files of a group are called, and the lines of its memory.stat."""

    limits: tuple[str, ...]
    used: str
    files: tuple[str, ...]  # in memory, and on a disk too
    needed: tuple[str, ...]  # of those, mapped by a program or not written yet


# Above memory.high a group is not ended, but held up so much that a run would hardly go on.
_V2 = _Version(
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
    ("file_mapped", "file_dirty", "file_writeback"),
)
_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
    ("total_mapped_file", "total_dirty", "total_writeback"),
)


def _memory_groups() -> Iterator[_Group]:
    """The groups that bound this process's memory: its own and those around it, of cgroup v2 or v1."""
    for line in (_read(_OWN_GROUPS) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUP / controllers
        version = _V1 if controllers else _V2
        place = root / path.lstrip("/")
        for folder in (place, *(parent for parent in place.parents if parent.is_relative_to(root))):
            limits = [int(text) for name in version.limits if (text := _read(folder / name) or "").isdigit()]
            used = _read(folder / version.used) or ""
            if limits and used.isdigit():
                yield _Group(min(limits), int(used) - _reclaimable(folder, version))


def _reclaimable(folder: Path, version: _Version) -> int:
    """Bytes of files that a group gives up before it runs out: those that no program has mapped and the disk has."""
    lines = (line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
    found = {parts[0]: int(parts[1]) for parts in lines if len(parts) == 2 and parts[1].isdigit()}
    files, needed = (sum(found.get(name, 0) for name in names) for names in (version.files, version.needed))
    return max(0, files - needed)


def memory_limit() -> int | None:
    """The most bytes that the container may hold (cgroup v2 or v1); None without such a limit."""
    import psutil

    limit = min((group.limit for group in _memory_groups()), default=None)
    return None if limit is None or limit >= psutil.virtual_memory().total else limit


def resident_memory() -> int:
    """Bytes that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_addresses() -> int | None:
    """Bytes of address space that RLIMIT_AS leaves this process; None without such a limit."""
    if sys.platform == "win32":
        return None
    import resource

    import psutil

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if most == resource.RLIM_INFINITY else max(0, most - int(psutil.Process().memory_info().vms))


def own_memory() -> int:
    """Bytes that this process shares with no other: what a second one like it would take besides."""
    import psutil

    held = psutil.Process().memory_info()
    return int(held.rss - held.shared if sys.platform.startswith("linux") else held.rss)


def unused_memory() -> int:
    """Bytes of memory that are left to all processes of this container together."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(group.limit - group.used for group in _memory_groups())]))


def free_memory() -> int:
    """Bytes that this process could still take, without those that it holds already."""
    unused, addresses = unused_memory(), free_addresses()
    return unused if addresses is None else min(unused, addresses)


def return_freed_memory() -> None:
    """Give back what glibc keeps of freed pieces; other C libraries do so by themselves."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def tidied(pieces: Iterable[T], every: int = 8) -> Iterator[T]:
    """The pieces of some work; after every so many, what is kept of freed memory is given back.

    Else it grows for long, though ever more slowly: pieces differ, and what one leaves fits the next not quite.
    """
    for number, piece in enumerate(pieces, start=1):
        yield piece
        if number % every == 0:
            return_freed_memory()

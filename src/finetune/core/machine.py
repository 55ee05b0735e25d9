"""What this process may use of the machine: cores and memory, with the limits of a container."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


class _Group(NamedTuple):
    """Bytes of a control group."""

    limit: int
    used: int


def _memory_groups() -> Iterator[_Group]:
    """The groups that bound this process's memory: its own and those around it, of cgroup v2 or v1."""
    for line in (_read(_OWN_GROUPS) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current")
        root = _CGROUP
        if controllers:
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes"), _CGROUP / "memory"
        place = root / path.lstrip("/")
        for folder in (place, *(parent for parent in place.parents if parent.is_relative_to(root))):
            limit, used = (_read(folder / name) or "" for name in names)
            if limit.isdigit() and used.isdigit():
                yield _Group(int(limit), int(used) - _cached_files(folder))


def _cached_files(folder: Path) -> int:
    """Bytes of files in memory that a group gives up before it runs out."""
    lines = (line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
    found = {parts[0]: int(parts[1]) for parts in lines if len(parts) == 2 and parts[1].isdigit()}
    return found.get("total_inactive_file", found.get("inactive_file", 0))


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


def free_memory() -> int:
    """Bytes that this process could still take, without those that it holds already."""
    import psutil

    free = int(psutil.virtual_memory().available)
    free = min([free, *(group.limit - group.used for group in _memory_groups())])
    addresses = free_addresses()
    return max(0, free if addresses is None else min(free, addresses))

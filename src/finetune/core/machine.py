"""What this process may use of the machine: cores and memory, with the limits of a container."""

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cgroup(name: str) -> str | None:
    """A file of this container's control group, such as `memory.max`; None where there is none."""
    try:
        return (_CGROUP / name).read_text(encoding="ascii").strip()
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


def memory_limit() -> int | None:
    """The most bytes that the container may hold (cgroup v2, else v1); None without such a limit."""
    import psutil

    limit = cgroup("memory.max") or cgroup("memory/memory.limit_in_bytes")
    return int(limit) if limit and limit.isdigit() and int(limit) < psutil.virtual_memory().total else None


def resident_memory() -> int:
    """Bytes that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes that this process could still take, without those that it holds already."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = memory_limit(), cgroup("memory.current")
    if limit is not None:
        free = min(free, limit - (int(used) if used and used.isdigit() else 0))
    if sys.platform != "win32":
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            free = min(free, most - psutil.Process().memory_info().vms)
    return max(0, free)

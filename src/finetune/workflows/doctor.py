"""Look at this machine: what is installed, what it can hold, what is missing, and what to do about it."""

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.schema import ModelConfig
from finetune.core.errors import FinetuneError
from finetune.engines.base import EngineInfo

LIBRARIES = ("mlx", "mlx-lm", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pydantic")
OPTIONAL = {"pyarrow": "reads Parquet files: pip install 'finetune[parquet]'"}
OLDEST_PYTHON = (3, 11)
LITTLE_MEMORY = 4e9
LITTLE_DISK = 5e9


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `ft doctor` found. `problems` are sentences that end in what to do; none means ready to train."""

    finetune: str
    python: str
    platform: str
    cpu: dict[str, Any]
    memory: dict[str, Any]
    disk: dict[str, Any]
    libraries: dict[str, str | None]
    engines: list[dict[str, Any]]
    hugging_face: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"ok": not self.problems, **asdict(self)}


def examine(directory: Path = Path()) -> Diagnosis:
    """Look at everything; `directory` is where runs would be written. Never fails: a fault becomes a problem."""
    problems: list[str] = []
    advice: list[str] = []
    return Diagnosis(
        finetune=__version__,
        python=_python(problems),
        platform=platform.platform(terse=True),
        cpu={"architecture": platform.machine(), "cores": usable_cores()},
        memory=_memory(advice),
        disk=_disk(directory, advice),
        libraries=_libraries(problems, advice),
        engines=_engines(problems, advice),
        hugging_face=_hugging_face(),
        problems=problems,
        advice=advice,
    )


def _python(problems: list[str]) -> str:
    if sys.version_info < OLDEST_PYTHON:
        problems.append(f"Python {platform.python_version()} is too old. Install Python 3.11 or newer.")
    return platform.python_version()


def usable_cores() -> int:
    """Cores that this process may use: affinity, and the quota of a container."""
    if sys.platform.startswith("linux"):
        cores = len(os.sched_getaffinity(0))
        quota = _cgroup("cpu.max")
        parts = quota.split() if quota else []
        if len(parts) == 2 and parts[0].isdigit() and int(parts[1]):
            cores = min(cores, max(1, int(parts[0]) // int(parts[1])))
        return cores
    return os.cpu_count() or 1


def _cgroup(name: str) -> str | None:
    """A limit that a container (cgroup v2) sets for this process; None where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None


def _memory(advice: list[str]) -> dict[str, Any]:
    import psutil

    found = psutil.virtual_memory()
    limit = _cgroup("memory.max") or _cgroup("memory/memory.limit_in_bytes")
    container = int(limit) if limit and limit.isdigit() and int(limit) < found.total else None
    usable = min(found.available, container or found.available)
    if usable < LITTLE_MEMORY:
        advice.append(f"Only {usable / 1e9:.1f} GB of memory are free: close other programs, or choose a small model.")
    return {"total_bytes": found.total, "available_bytes": found.available, "container_limit_bytes": container}


def _disk(directory: Path, advice: list[str]) -> dict[str, Any]:
    usage = shutil.disk_usage(directory)
    if usage.free < LITTLE_DISK:
        advice.append(f"Only {usage.free / 1e9:.1f} GB are free on this disk: checkpoints need room, so make some.")
    return {"directory": str(directory.resolve()), "free_bytes": usage.free, "total_bytes": usage.total}


def _libraries(problems: list[str], advice: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {name: _version(name) for name in (*LIBRARIES, *OPTIONAL)}
    for name in LIBRARIES:
        if found[name] is None:
            problems.append(f"{name} is not installed. Install finetune again: pip install finetune")
    advice.extend(f"{name} is not installed; it {use}" for name, use in OPTIONAL.items() if found[name] is None)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _engines(problems: list[str], advice: list[str]) -> list[dict[str, Any]]:
    try:
        info = _ask_mlx()
    except (FinetuneError, ImportError, OSError, RuntimeError) as error:
        problems.append(f"The mlx engine does not start: {error}")
        return [{"name": "mlx", "available": False, "error": str(error)}]
    advice.extend(info.advice)
    record = {field: getattr(info, field) for field in ("name", "version", "device", "advice")}
    return [{"available": True, **record, "details": dict(info.details)}]


def _ask_mlx() -> EngineInfo:
    from finetune.engines.registry import choose_engine

    return choose_engine(ModelConfig(name="demo", backend="mlx")).info()


def _hugging_face() -> dict[str, Any]:
    from huggingface_hub import constants

    from finetune.models import cache

    return {
        "cache": str(cache.location()),
        "models": len(cache.model_names()),
        "offline": bool(constants.HF_HUB_OFFLINE),
    }

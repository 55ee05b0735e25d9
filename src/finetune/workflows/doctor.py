"""Look at this machine: what is installed, what it can hold, what is missing, and what to do about it."""

import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.schema import ModelConfig
from finetune.core import machine
from finetune.core.errors import FinetuneError
from finetune.core.paths import cache_directory
from finetune.core.types import Dtype
from finetune.engines.registry import (
    ENGINES,
    HOW_TO_INSTALL,
    LIBRARY,
    EngineChoice,
    EngineName,
    choose,
    is_installed,
    load_engine,
)

LIBRARIES = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pydantic")
ENGINE_LIBRARIES = ("mlx", "mlx-lm", "torch", "bitsandbytes")  # each engine says itself what it lacks
OPTIONAL = {"pyarrow": "reads Parquet files: pip install 'finetune[parquet]'"}
ANY_MODEL = ModelConfig(name="demo")
STORED: Dtype = "bfloat16"  # what most models' files hold
MEASURED: tuple[Dtype, ...] = ("float32", "bfloat16")
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
    engine: dict[str, str]  # the one that `auto` chooses, and why
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
        cpu={"architecture": platform.machine(), "cores": machine.usable_cores()},
        memory=_memory(advice),
        disk=_disk(directory, advice),
        libraries=_libraries(problems, advice),
        engine=asdict(choose(ANY_MODEL)),
        engines=_engines(problems, advice),
        hugging_face=_hugging_face(advice),
        problems=problems,
        advice=advice,
    )


def _python(problems: list[str]) -> str:
    if sys.version_info < OLDEST_PYTHON:
        problems.append(f"Python {platform.python_version()} is too old. Install Python 3.11 or newer.")
    return platform.python_version()


def _memory(advice: list[str]) -> dict[str, Any]:
    import psutil

    free, limit = machine.free_memory(), machine.memory_limit()
    if free < LITTLE_MEMORY:
        advice.append(f"Only {free / 1e9:.1f} GB of memory are free: close other programs, or choose a small model.")
    total = psutil.virtual_memory().total
    return {"total_bytes": total, "available_bytes": free, "container_limit_bytes": limit}


def _disk(directory: Path, advice: list[str]) -> dict[str, Any]:
    usage = shutil.disk_usage(directory)
    if usage.free < LITTLE_DISK:
        advice.append(f"Only {usage.free / 1e9:.1f} GB are free on this disk: checkpoints need room, so make some.")
    own = cache_directory()
    held = sum(file.stat().st_size for file in own.rglob("*") if file.is_file()) if own.is_dir() else 0
    return {
        "directory": str(directory.resolve()),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "cache": {"directory": str(own), "bytes": held},
    }


def _libraries(problems: list[str], advice: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {name: _version(name) for name in (*LIBRARIES, *ENGINE_LIBRARIES, *OPTIONAL)}
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
    """Every engine, the one that `auto` chooses first. Only that one can stand in the way of training."""
    chosen = choose(ANY_MODEL).name
    records = []
    for name in sorted(ENGINES, key=lambda name: name != chosen):
        record = _engine(name)
        records.append({**record, "chosen": name == chosen})
        if "error" in record:
            (problems if name == chosen else advice).append(record["error"])
        advice.extend(record.get("advice", ()))
    return records


def _engine(name: EngineName) -> dict[str, Any]:
    """What an engine says of itself, and how fast it multiplies; `error` where it cannot be asked."""
    if not is_installed(name):
        missing = f"The {name} engine is not there: {LIBRARY[name]} is not installed. {HOW_TO_INSTALL[name]}"
        return {"name": name, "available": False, "error": missing}
    try:
        engine = load_engine(EngineChoice(name, "ft doctor"))
        info = engine.info()
        return {
            "name": name,
            "available": True,
            "version": info.version,
            "device": info.device,
            "details": dict(info.details),
            "advice": list(info.advice),
            "auto_dtype": engine.compute_dtype(ANY_MODEL, STORED),
            "matmul_gflops": {dtype: round(engine.matmul_rate(dtype) / 1e9, 1) for dtype in MEASURED},
        }
    except (FinetuneError, ImportError, OSError, RuntimeError, ValueError) as error:
        said = str(error) or type(error).__name__
        return {"name": name, "available": False, "error": f"The {name} engine does not start: {said}"}


def _hugging_face(advice: list[str]) -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    from finetune.hub import cache, client

    offline = bool(constants.HF_HUB_OFFLINE)
    reachable = None if offline else client.is_reachable()
    if reachable is False:
        advice.append(
            f"{client.endpoint()} cannot be reached: models can be tuned from the cache and from directories only. "
            "Behind a proxy set HTTPS_PROXY; for a mirror set HF_ENDPOINT."
        )
    return {
        "cache": str(cache.location()),
        "models": len(cache.model_names()),
        "endpoint": client.endpoint(),
        "offline": offline,
        "reachable": reachable,
        "token": get_token() is not None,
    }

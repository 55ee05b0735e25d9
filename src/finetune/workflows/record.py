"""`run.json`: with what a run was done, so that it can be understood and repeated."""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import PurePath
from typing import Any

from finetune import __version__
from finetune.core.errors import CheckpointError
from finetune.core.paths import RunPaths
from finetune.workflows.preparation import Preparation
from finetune.workflows.starting_adapter import fingerprint

FORMAT = 1
LIBRARIES = ("numpy", "safetensors", "tokenizers", "transformers")


def run_record(prepared: Preparation) -> dict[str, Any]:
    """Versions, machine, and what identifies model and data."""
    info = prepared.engine.info()
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "finetune": __version__,
            "python": platform.python_version(),
            info.name: info.version,
            **info.details,
            **{name: metadata.version(name) for name in LIBRARIES},
        },
        "engine": {key: value for key, value in engine_record(prepared).items() if key != "reason"},
        "engine_reason": prepared.choice.reason,
        "machine": _machine(),
        "git": _git(),
        "model": {
            "name": prepared.config.model.name,
            "revision": prepared.config.model.revision,
            "path": str(prepared.source.path),
            "model_type": prepared.source.model_type,
            "files": prepared.model_files(),
        },
        "adapter": {"path": prepared.config.lora.init_from, "files": fingerprint(prepared.config)},
        "tokenizer": {"sha256": prepared.tokenizer.fingerprint},
        "template": {"name": prepared.data.template.name, "sha256": prepared.data.template.sha256},
        "max_length": prepared.data.max_length,
        "data": dict(prepared.data.fingerprints),
    }


def engine_record(prepared: Preparation) -> dict[str, str]:
    """What computes, why it was chosen, where, and in which type."""
    choice = prepared.choice
    return {"name": choice.name, "reason": choice.reason, "device": prepared.device, "dtype": prepared.dtype}


def identity_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when the run goes on: hashes, never the places where files lie."""
    data = {key: value for key, value in record["data"].items() if key not in {"files", "template", "tokenizer"}}
    files = {
        f"{number} ({PurePath(file['path']).name})": {"sha256": file["sha256"]}
        for number, file in enumerate(record["data"]["files"], start=1)
    }
    return {
        "model": record["model"]["files"],
        "adapter": record.get("adapter", {}).get("files", {}),
        "tokenizer": record["tokenizer"]["sha256"],
        "template": record["template"]["sha256"],
        "data": {"file": files, **data},
    }


def read_record(paths: RunPaths) -> Mapping[str, Any]:
    """`run.json` of a run. Raises CheckpointError where it cannot be read."""
    try:
        record = json.loads(paths.run_info.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']}, this version reads {FORMAT}")
        return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{paths.run_info} cannot be read: {error}. The run cannot go on.") from error


def _machine() -> dict[str, Any]:
    import psutil

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def _git() -> dict[str, Any] | None:
    """The commit that the run was started in, and whether files differed from it; None outside a repository."""
    commit = _ask_git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(_ask_git("status", "--porcelain"))}


def _ask_git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()

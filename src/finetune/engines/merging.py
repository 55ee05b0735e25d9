"""Merges an adapter into its base, file by file. An engine reads and writes tensors; the rest is the same for all.

LoRA gives W + s B A; DoRA gives each of its rows the length m (Liu et al. 2024, equation 5). Both are computed in
float32 and rounded once, to what the base's files hold.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from finetune.adapters.adapter import Adapter, LoraUpdate
from finetune.core.errors import ModelError, UsageError
from finetune.core.types import FloatArray, MergeReport
from finetune.models.older_names import with_older_names
from finetune.models.weights import INDEX, read_weights
from finetune.models.writing import copy_companions


class Stored(NamedTuple):
    """A matrix in the form of the files: tensors by name, and the values that they stand for."""

    tensors: Mapping[str, Any]
    values: FloatArray


class WeightFiles(Protocol):
    """The base's tensors as an engine reads and writes them. Names are those of the files."""

    def read(self, name: str) -> FloatArray:
        """The values of a linear module's weight, as adapters were trained on them."""
        ...

    def store(self, name: str, values: FloatArray) -> Stored:
        """What is written for new values of that weight."""
        ...

    def keep(self, name: str) -> Mapping[str, Any]:
        """What is written for a tensor that no update changes; nothing for a part of another tensor's form."""
        ...

    def write(self, file: Path, tensors: Mapping[str, Any]) -> None:
        """Write one safetensors file."""
        ...


def merge_files(
    base: Path,
    destination: Path,
    adapter: Adapter,
    files: WeightFiles,
    *,
    names: Callable[[str], Iterable[str]],
    transposed: bool,
    config: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> MergeReport:
    """Write the merged model at `destination`, which appears only when it is whole.

    `names` gives the possible names of a module's weight in the files, which hold it as (in, out) where
    `transposed`; `config` changes what config.json says. Raises ModelError where a module has no weight of its own.
    """
    with _whole(destination) as partial:
        copy_companions(base, partial)
        _write_config(base, partial, config)
        candidates = {name: module for module in adapter.updates for name in names(module)}
        changes: list[float] = []
        placed: dict[str, str] = {}
        size = 0
        for file, stored in _by_file(base).items():
            written: dict[str, Any] = {}
            for name in stored:
                if name in candidates:
                    tensors, change = _merged(adapter, candidates[name], files, name, transposed)
                    changes.append(change)
                else:
                    tensors = files.keep(name)
                written.update(tensors)
            files.write(partial / file.name, written)
            placed.update(dict.fromkeys(written, file.name))
            size += sum(array.nbytes for array in written.values())
        _require_all(len(changes), adapter, base)
        if (base / INDEX).is_file():
            _write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))})
    return MergeReport(len(changes), max(changes, default=0.0))


def require_new(destination: Path) -> None:
    """Raises UsageError where something is at `destination` already, except an empty directory."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} exists already. Choose a new or empty directory.")


def merged_weight(weight: FloatArray, update: LoraUpdate, scale: float) -> FloatArray:
    """W + scale B A [out, in]; with a magnitude, its rows in that length."""
    merged: FloatArray = weight + np.float32(scale) * (update.b @ update.a)
    if update.magnitude is None:
        return merged
    lengths = np.linalg.norm(merged, axis=1)
    merged *= np.divide(update.magnitude, lengths, out=np.ones_like(lengths), where=lengths > 0)[:, None]
    return merged


def _merged(
    adapter: Adapter, module: str, files: WeightFiles, name: str, transposed: bool
) -> tuple[Mapping[str, Any], float]:
    """What is written for the merged weight, and its largest change."""
    update = adapter.updates[module]
    before = files.read(name)
    weight = before.T if transposed else before
    after = merged_weight(weight, update, adapter.config.scale(module, update.rank))
    tensors, values = files.store(name, after.T if transposed else after)
    return tensors, float(np.abs(values - before).max())


def _by_file(base: Path) -> dict[Path, list[str]]:
    """Names of the tensors of each weight file."""
    found: dict[Path, list[str]] = {}
    for tensor in read_weights(base):
        found.setdefault(tensor.file, []).append(tensor.name)
    return found


def _require_all(merged: int, adapter: Adapter, base: Path) -> None:
    if merged != len(adapter.updates):
        raise ModelError(
            f"Only {merged} of {len(adapter.updates)} adapted modules have a tensor of their own in {base}: "
            "this architecture cannot be merged. Keep base and adapter apart."
        )


@contextmanager
def _whole(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` that takes its place when everything in it is written, or disappears."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_config(base: Path, directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = with_older_names(json.loads((base / "config.json").read_text(encoding="utf-8")))
    _write_json(directory / "config.json", change(config))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

"""Checkpoints that are whole or absent: written beside their place, synced, sealed by a manifest, then renamed.

A directory without a valid manifest is never resumed from and never deleted. See docs/checkpoint-format.md.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import CheckpointError, FinetuneError, TrainingError
from finetune.core.files import is_temporary, sha256_of, sync, temporary_beside
from finetune.core.paths import MANIFEST, RunPaths
from finetune.engines.base import TrainSession
from finetune.training.state import TrainingState

FORMAT = 2
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
NOT_PART_OF_THE_RESULT = frozenset({MANIFEST, STATE, OPTIMIZER})
NO_SPACE = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Part:
    """A line of a manifest."""

    name: str  # relative, with forward slashes
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run: `keep` latest ones and the best stay, older ones go."""

    paths: RunPaths
    keep: int

    def save(self, session: TrainSession, state: TrainingState) -> Path:
        """Write the checkpoint of `state.step`, whole, then rotate and point `best` at the best one.

        Raises TrainingError where the disk is full or cannot be written; earlier checkpoints stay as they are
        and nothing of the new one is left.
        """
        target = self.paths.checkpoint(state.step)
        temporary = temporary_beside(target)
        try:
            self.paths.checkpoints.mkdir(exist_ok=True)
            temporary.mkdir()
            session.save_weights(temporary)
            session.save_state(temporary)
            (temporary / STATE).write_text(state.to_json(), encoding="utf-8")
            seal(temporary, step=state.step)
            set_aside(target)
            temporary.rename(target)
            sync(self.paths.checkpoints)
        except FinetuneError:
            raise
        except Exception as error:
            # Engines write through libraries that raise classes of their own where the disk is full.
            raise TrainingError(self._what_failed(error, state.step)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.point_at_best(state.best_step)
        self.rotate(best_step=state.best_step)
        return target

    def steps(self) -> list[int]:
        """Steps that have a directory here, damaged ones included, in order."""
        names = (re.fullmatch(r"step-(\d{6,})", path.name) for path in _children(self.paths.checkpoints))
        return sorted(int(match[1]) for match in names if match)

    def latest(self, warn: Warn) -> Path | None:
        """The latest checkpoint that is whole; None where there is none. `warn` hears of each damaged one."""
        for step in reversed(self.steps()):
            path = self.paths.checkpoint(step)
            problems = damage(path)
            if not problems:
                return path
            warn(f"Checkpoint {path.name} is damaged and is left alone ({'; '.join(problems)}).")
        return None

    def rotate(self, *, best_step: int | None) -> None:
        """Delete what is neither among the latest `keep` nor the best. Only sealed directories are deleted."""
        sealed = [step for step in self.steps() if is_sealed(self.paths.checkpoint(step))]
        for step in sealed[: -self.keep]:
            if step != best_step:
                _delete(self.paths.checkpoint(step))

    def rewind(self, step: int, *, best_step: int | None) -> None:
        """Make `step` the latest: whole checkpoints after it are deleted, damaged ones are set aside.

        They would be written again, byte for byte, by the run that goes on from here. What a process that died
        after its last rename did not come to, link and rotation, is done as well.
        """
        for later in [found for found in self.steps() if found > step]:
            set_aside(self.paths.checkpoint(later))
        self.point_at_best(best_step)
        self.rotate(best_step=best_step)

    def point_at_best(self, step: int | None) -> None:
        """Swap the relative link `best` in one move.

        No link where no step is the best, or where its checkpoint is gone: a run that goes back to an old
        checkpoint may find that its best of then was deleted when a better one came.
        """
        if step is None or not self.paths.checkpoint(step).is_dir():
            self.paths.best.unlink(missing_ok=True)
            return
        target = self.paths.checkpoint(step).relative_to(self.paths.root)
        if self.paths.best.is_symlink() and self.paths.best.readlink() == target:
            return
        temporary = temporary_beside(self.paths.best)
        temporary.symlink_to(target)
        temporary.replace(self.paths.best)

    def clean(self) -> None:
        """Remove temporary directories and links that a killed process of this run left behind."""
        for folder in (self.paths.root, self.paths.checkpoints):
            for path in [found for found in _children(folder) if is_temporary(found)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _what_failed(self, error: Exception, step: int) -> str:
        full = any(words in str(error) for words in NO_SPACE)
        free = shutil.disk_usage(self.paths.root).free / 1e6
        whole = [found for found in self.steps() if found != step and is_sealed(self.paths.checkpoint(found))]
        kept = f"The checkpoint of step {whole[-1]} is intact" if whole else "There is no earlier checkpoint"
        cause = f"the disk is full, or a limit on file sizes is reached ({error})" if full else str(error)
        return (
            f"The checkpoint of step {step} could not be written to {self.paths.checkpoints}: {cause}; "
            f"{free:,.0f} MB are free there. {kept}; nothing of the new one is left. "
            f"Free some space, then go on with `ft train --resume {self.paths.root}`."
        )


def seal(directory: Path, *, step: int) -> None:
    """Sync every file and directory, then write the manifest with their SHA-256, last."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }
    manifest = directory / MANIFEST
    manifest.write_text(_rendered({"format": FORMAT, "step": step, "files": entries}), "utf-8")
    sync(manifest)
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        sync(folder)


def is_sealed(directory: Path) -> bool:
    """Whether the manifest can be read and every file is there with its size. Cheap: reads no weights."""
    return not _missing_parts(directory)


def damage(directory: Path) -> list[str]:
    """Everything that differs from the manifest, each in a few words; empty for a whole checkpoint.

    Files that the manifest does not name (a file manager's own) do no harm and are not looked at.
    """
    problems = _missing_parts(directory)
    if problems:
        return problems
    parts = _read_manifest(directory)
    return [f"{part.name} has changed" for part in parts if sha256_of(directory / part.name) != part.sha256]


def read_state(directory: Path) -> TrainingState:
    """The state of a checkpoint that is whole. Raises CheckpointError with all that is wrong with another."""
    problems = damage(directory)
    if problems:
        raise CheckpointError(
            f"{directory} is not a whole checkpoint: {'; '.join(problems)}. "
            f"Resume from the run's directory instead: the latest whole checkpoint is chosen there."
        )
    return TrainingState.from_json((directory / STATE).read_text(encoding="utf-8"))


def set_aside(directory: Path) -> None:
    """Make room at `directory`: delete a whole checkpoint, rename anything else to `<name>.damaged`."""
    if not directory.exists():
        return
    if not damage(directory):
        _delete(directory)
        return
    place = directory.with_name(f"{directory.name}.damaged")
    while place.exists():
        place = place.with_name(f"{place.name}+")
    directory.rename(place)


def copy_result(checkpoint: Path, destination: Path) -> None:
    """Put a checkpoint's weights in `destination` (replacing it), without optimizer, state and manifest."""
    temporary = temporary_beside(destination)
    try:
        shutil.copytree(checkpoint, temporary, ignore=lambda _folder, _names: NOT_PART_OF_THE_RESULT)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if destination.exists():
            _delete(destination)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(destination.parent)


def _missing_parts(directory: Path) -> list[str]:
    try:
        parts = _read_manifest(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is missing, unreadable or changed"]
    sizes = {part: _size(directory / part.name) for part in parts}
    return [
        f"{part.name} is missing" if size is None else f"{part.name} has {size:,} bytes, not {part.size:,}"
        for part, size in sizes.items()
        if size != part.size
    ]


def _rendered(document: Mapping[str, Any]) -> str:
    """The text of a manifest, which ends with its own hash: there is one text for each content."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return json.dumps({**document, "sha256": digest}, indent=2) + "\n"


def _read_manifest(directory: Path) -> list[_Part]:
    """The files that the manifest names. Raises OSError, ValueError, KeyError, TypeError or AttributeError."""
    text = (directory / MANIFEST).read_text(encoding="utf-8")
    document = json.loads(text)
    del document["sha256"]
    files = document["files"]
    if text != _rendered(document) or document["format"] != FORMAT or STATE not in files:
        raise ValueError("not a manifest of this format, or changed")
    return [_Part(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _delete(directory: Path) -> None:
    """Rename, then delete: a kill in between leaves a temporary directory, never half a checkpoint."""
    doomed = temporary_beside(directory)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)

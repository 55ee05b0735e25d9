"""The directory of one run: made new or opened again, and held by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.core.errors import CheckpointError, TrainingError, UsageError
from finetune.core.files import temporary_beside
from finetune.core.paths import RunPaths


def check_new(directory: Path) -> None:
    """Refuse a directory that has something in it. Creates nothing.

    Raises UsageError that says what to do instead.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UsageError(f"output.output_dir={directory} is a file. Choose another directory.")
    if RunPaths(directory).run_info.exists():
        raise UsageError(
            f"output.output_dir={directory} holds a run already. "
            f"Go on with it: `ft train --resume {directory}`, or choose another directory."
        )
    if any(directory.iterdir()):
        raise UsageError(
            f"output.output_dir={directory} exists and is not empty. A run's directory must be new or empty: "
            f"choose another one, for example {directory / 'run-1'}."
        )


def create(directory: Path, fill: Callable[[RunPaths], None]) -> RunPaths:
    """Make the directory (and its parents) with what `fill` writes into it, all at once.

    It is filled under a temporary name and renamed; an empty directory that is there already is filled in place,
    because a shell may stand in it. Raises UsageError where `check_new` does and where it cannot be made,
    TrainingError where it cannot be written; nothing is left of it then.
    """
    check_new(directory)
    place = directory if directory.exists() else temporary_beside(directory)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output.output_dir={directory} cannot be made: {error.strerror}.") from error
    try:
        fill(RunPaths(place))
        if place != directory:
            place.rename(directory)
    except OSError as error:
        _empty(place)
        if place != directory:
            place.rmdir()
        raise TrainingError(f"The run's directory {directory} cannot be written: {error}.") from error
    return RunPaths(directory)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def locate(path: Path) -> tuple[RunPaths, Path | None]:
    """What `--resume` names: a run's directory, or one of its checkpoints (also the link `best`).

    Returns the run and the checkpoint, which is None for "the latest". Raises CheckpointError for anything else.
    """
    if RunPaths(path).run_info.is_file():
        return RunPaths(path), None
    resolved = path.resolve()  # `best` is a link
    if resolved.is_dir() and RunPaths(resolved.parent.parent).run_info.is_file():
        return RunPaths(resolved.parent.parent), resolved
    what = "is not there" if not resolved.exists() else "is neither a run (no run.json in it) nor a run's checkpoint"
    raise CheckpointError(
        f"{path} {what}. Give --resume the directory of a run, for example outputs/my-run, "
        f"or one of its checkpoints, for example outputs/my-run/checkpoints/step-000100."
    )


@contextmanager
def held(paths: RunPaths) -> Iterator[None]:
    """Hold the run for this process, so that no two train in it. The lock vanishes with the process.

    Raises TrainingError where another process holds it.
    """
    descriptor = os.open(paths.root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise TrainingError(f"Another process is training in {paths.root}. Wait for it, or stop it.") from error
    try:
        yield
    finally:
        os.close(descriptor)

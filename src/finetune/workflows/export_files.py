"""Where an export is written: beside its place, which it takes when it is whole and checked."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.core.errors import FinetuneError, UsageError
from finetune.core.files import temporary_beside


@contextmanager
def beside(output: Path, part: str) -> Iterator[Path]:
    """A directory's name beside the output, of which nothing is left after the block."""
    temporary = temporary_beside(output.resolve().with_name(f"{output.resolve().name}.{part}"))
    try:
        yield temporary
    except OSError as error:
        raise FinetuneError(f"{output} cannot be written: {_reason(error)}. Nothing was left there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _reason(error: OSError) -> str:
    if error.strerror:
        return error.strerror
    # NumPy says only how many values it could not write.
    return "the disk is full, or files may not be that large" if "requested" in str(error) else str(error)


def require_free(outputs: Sequence[Path]) -> None:
    """Raises UsageError where a file that an export shall write is there already."""
    for output in outputs:
        if output.exists():
            raise UsageError(f"{output} exists already. Choose another --output, or remove it.")


def require_space(output: Path, size: int) -> None:
    """Raises FinetuneError where the disk has no room for `size` bytes."""
    place = next(parent for parent in output.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise FinetuneError(
            f"{output} needs {size / 1e9:,.2f} GB, and {place} has {free / 1e9:,.2f} GB free. "
            "Free some, choose another --output, or fewer bits with --quantize."
        )


def move_all(files: Sequence[tuple[Path, Path]]) -> None:
    """Give finished files their names; if one cannot have it, none stays."""
    done: list[Path] = []
    try:
        for source, destination in files:
            if destination.exists():
                raise FileExistsError(errno.EEXIST, "something else was written there meanwhile", str(destination))
            source.replace(destination)
            done.append(destination)
    except OSError:
        for path in done:
            path.unlink(missing_ok=True)
        raise

"""Files that are either whole or absent, also after a power cut."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file that anybody may have written.

    Raises OSError, or ValueError for what is not JSON, not UTF-8, or nested deeper than any real file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A name in the same directory that nothing has yet: `.<name>.tmp-<random>`."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def is_temporary(path: Path) -> bool:
    """Whether `temporary_beside` made this name."""
    return path.name.startswith(".") and ".tmp-" in path.name


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text` (UTF-8): readers see the old one or the new one, never a part.

    Raises OSError, and then leaves nothing behind.
    """
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)

"""Weights that are quantised on loading, read back where an earlier run has kept them: the same on every engine."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from finetune.core.errors import ModelError
from finetune.models.conversions import Conversion
from finetune.models.writing import Sized

_FILE = "packed.safetensors"

Array = TypeVar("Array", bound=Sized)


def read_or_pack(
    conversion: Conversion | None,
    *,
    read: Callable[[Path], None],
    pack: Callable[[], None],
    packed: Callable[[], Mapping[str, Array]],
    write: Callable[[Path, Mapping[str, Array]], None],
) -> tuple[str, ...]:
    """Take packed weights from a file, or pack them and keep them in one; None: they are not kept.

    `packed` are all arrays after `pack`; `write` makes one safetensors file of them, and `read` takes it as it is.
    Returns what a person should know.
    """
    notices: list[str] = []
    if conversion is None:
        pack()
    elif not _found(conversion, read, notices.append):
        pack()
        arrays = packed()
        size = sum(array.nbytes for array in arrays.values())
        conversion.keep(size, lambda directory: write(directory / _FILE, arrays), notices.append)
    return tuple(notices)


def _found(conversion: Conversion, read: Callable[[Path], None], say: Callable[[str], None]) -> bool:
    entry = conversion.find(say)
    if entry is None:
        return False
    try:
        read(entry / _FILE)
    except (OSError, ModelError):  # another process has deleted it this moment, to make room
        return False
    say(f"The quantised weights are those that an earlier run made ({entry}).")
    return True

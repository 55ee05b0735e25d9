"""`optimizer.safetensors`: what a training session needs beside its weights to go on, one layout for all engines.

`step` counts applied steps, `<slot>:<weight>` is the optimizer's state, `calls` counts steps for the dropout stream,
and `master:<weight>` are float32 weights where those of the model's files are rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from finetune.core.errors import CheckpointError
from finetune.core.types import FloatArray

STATE_FILE = "optimizer.safetensors"
_MASTER = "master:"
_CALLS = "calls"


@dataclass(frozen=True, slots=True)
class SessionState:
    """The content of the file."""

    optimizer: Mapping[str, Any]
    masters: Mapping[str, FloatArray]  # empty where the model's files are exact
    calls: int


def write_state(directory: Path, optimizer: Mapping[str, Any], masters: Mapping[str, FloatArray], calls: int) -> None:
    """Write the file into an existing directory."""
    arrays = dict(optimizer)
    arrays.update({f"{_MASTER}{name}": array for name, array in masters.items()})
    arrays[_CALLS] = np.array(calls, np.int64)
    save_file(arrays, directory / STATE_FILE)


def read_state(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> SessionState:
    """Read it back, given the shapes of the optimizer's state.

    Raises CheckpointError where it is damaged, or of another optimizer, model or adapter.
    """
    path = directory / STATE_FILE
    try:
        found = dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Resume from another checkpoint.") from None
    masters = {name.removeprefix(_MASTER): found.pop(name) for name in list(found) if name.startswith(_MASTER)}
    calls = found.pop(_CALLS, None)
    if calls is None or {name: array.shape for name, array in found.items()} != dict(shapes):
        raise CheckpointError(
            f"{path} belongs to another optimizer, model or adapter. Resume with the configuration of the checkpoint."
        )
    return SessionState(found, masters, int(calls))

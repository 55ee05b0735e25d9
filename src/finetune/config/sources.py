"""Where a value came from: the part of an error that tells a person what to edit."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class Layer(IntEnum):
    """The places a value can come from; a later one wins."""

    DEFAULT = 0
    PROFILE = 1
    FILE = 2
    ENVIRONMENT = 3
    SET = 4
    FLAG = 5


@dataclass(frozen=True, slots=True)
class Source:
    """A layer, with the name of the profile, file, variable or flag in it, and the line in a file (from 1)."""

    layer: Layer
    name: str = ""
    line: int | None = None

    def __str__(self) -> str:
        match self.layer:
            case Layer.DEFAULT:
                return "default"
            case Layer.PROFILE:
                return f"profile {self.name}"
            case Layer.FILE:
                return f"{Path(self.name).name}:{self.line}" if self.line else Path(self.name).name
            case Layer.ENVIRONMENT:
                return f"environment variable {self.name}"
            case Layer.SET:
                return "--set"
            case Layer.FLAG:
                return self.name

    @property
    def place(self) -> str:
        """As `str`, but only the line where the file is already named above."""
        return f"line {self.line}" if self.layer is Layer.FILE and self.line else str(self)


# What a person typed to give these keys; every other flag is named after its key.
FLAG_NAMES: Mapping[str, str] = {
    "model.name": "MODEL",
    "data.train_file": "DATA",
    "lora.rank": "--lora-rank",
    "lora.alpha": "--lora-alpha",
    "lora.init_from": "--from-adapter",
    "output.output_dir": "--output",
}

DEFAULT = Source(Layer.DEFAULT)

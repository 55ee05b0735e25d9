"""How a model's parameters are named in files, next to their names in transformers, which are PEFT's too.

They are the same, except in files that leave out the body's prefix (`transformer.` of GPT-2 on the hub).
"""

from collections.abc import Iterable
from dataclasses import dataclass

_GPT2 = "gpt2"


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of one model. `prefix` is what its files leave out before a parameter's name, if anything."""

    model_type: str
    prefix: str = ""

    @property
    def transposes(self) -> bool:
        """True where linear weights are stored as (in, out): PEFT's fan_in_fan_out."""
        return self.model_type == _GPT2

    def file_name(self, parameter: str) -> str:
        """The name under which the files hold a parameter."""
        return parameter.removeprefix(self.prefix)

    def parameter_name(self, stored: str, parameters: Iterable[str]) -> str:
        """The parameter that a file's tensor is for; the tensor's own name where there is none."""
        longer = f"{self.prefix}{stored}"
        return longer if self.prefix and longer in parameters else stored


def layout_of(model_type: str, prefix: str, stored: Iterable[str], parameters: Iterable[str]) -> Layout:
    """Whether the files leave out `prefix`: no tensor has it, although parameters do."""
    has_prefix = any(name.startswith(prefix) for name in stored)
    wants_prefix = any(name.startswith(prefix) for name in parameters)
    return Layout(model_type, prefix if wants_prefix and not has_prefix else "")

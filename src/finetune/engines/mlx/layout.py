"""How a model's parameters are named in files and in PEFT adapters, next to their names in mlx-lm.

They are the same for most architectures. mlx-lm renames some on loading; where a file's tensor reaches the model
as it is, loading shows its file name. GPT-2 also stores its matrices transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx import nn

_GPT2 = "gpt2"
_GPT2_BODY = "transformer."


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of one model. `renamed` maps parameters to file names, where the two differ."""

    model_type: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    rearranged: tuple[str, ...] = ()  # parameters that no single tensor of the files equals

    @property
    def transposes(self) -> bool:
        """True where files and PEFT hold linear weights as (in, out): PEFT's fan_in_fan_out."""
        return self.model_type == _GPT2

    def file_name(self, parameter: str) -> str:
        """The name under which transformers and mlx-lm read a parameter."""
        if self.model_type == _GPT2:
            return parameter.removeprefix("model.")
        return self.renamed.get(parameter, parameter)

    def short_name(self, name: str) -> str:
        """A tensor's name in files that leave out the body's prefix, as GPT-2's do on the hub."""
        return name.removeprefix(_GPT2_BODY) if self.model_type == _GPT2 else name

    def adapter_name(self, module: str) -> str:
        """The module's path in transformers, which PEFT uses."""
        if self.model_type == _GPT2:
            return _GPT2_BODY + module.removeprefix("model.")
        return self.file_name(f"{module}.weight").removesuffix(".weight")

    def transposed(self, model: Any) -> frozenset[str]:
        """Parameters that the files hold transposed."""
        return _linear_weights(model) if self.transposes else frozenset()

    def file_tensors(self, model: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as the files hold them: renamed, and transposed where the layout says so."""
        linear = self.transposed(model)
        return {self.file_name(name): value.T if name in linear else value for name, value in parameters.items()}


def _linear_weights(model: Any) -> frozenset[str]:
    return frozenset(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear))


def layout_of(model_type: str, files: Mapping[str, Any], parameters: Mapping[str, Any]) -> Layout:
    """Compare the files' tensors with what `sanitize` made of them, by identity."""
    if model_type == _GPT2:
        return Layout(model_type)
    names = {id(array): name for name, array in files.items()}
    renamed, rearranged = {}, []
    for parameter, array in parameters.items():
        source = names.get(id(array))
        if source is None:
            rearranged.append(parameter)
        elif source != parameter:
            renamed[parameter] = source
    return Layout(model_type, renamed, tuple(rearranged))


def without_prefix(model_type: str, files: dict[str, Any]) -> dict[str, Any]:
    """Files of GPT-2 as mlx-lm expects them: no `transformer.`, no buffers, no copy of the tied head."""
    if model_type != _GPT2:
        return files
    buffers = (".attn.bias", ".attn.masked_bias")
    short = {name.removeprefix(_GPT2_BODY): array for name, array in files.items()}
    return {name: array for name, array in short.items() if not name.endswith(buffers) and name != "lm_head.weight"}


def layers_of(model: Any) -> list[tuple[str, Any]]:
    """(path, layer) of the repeated blocks: the children of the longest list of modules."""
    lists: dict[str, list[tuple[str, Any]]] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and isinstance(module, nn.Module):
            lists.setdefault(parent, []).append((path, module))
    return max(lists.values(), key=len, default=[])

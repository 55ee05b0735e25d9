"""Does an adapter belong to a model? Every mismatch of names and shapes at once."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from finetune.adapters.adapter import Adapter
from finetune.adapters.store import read_adapter
from finetune.adapters.targets import LinearShape
from finetune.core.errors import ModelError


def read_fitting(path: Path, shapes: Mapping[str, LinearShape], names: Mapping[str, str]) -> Adapter:
    """Read an adapter of any layout and give its modules PEFT's names.

    `shapes` are the model's linear modules by PEFT's names; `names` maps those of the engine's library to PEFT's.
    A module of another library's name (GPT-2's are `model.h.0...` in mlx-lm, `transformer.h.0...` in transformers)
    is the one that is called the same from the number of its layer on. Raises ModelError with every module that
    the model lacks and every shape that does not fit it.
    """
    adapter = read_adapter(path)
    tails = _by_tail(shapes)
    known = {module: _name(module, shapes, names, tails) for module in adapter.updates}
    adapter = adapter.renamed(known)
    problems = _mismatches(adapter, shapes)
    if problems:
        raise ModelError("\n  ".join([f"The adapter {path} does not fit the model:", *problems]))
    return adapter


def within_layers(module: str) -> str:
    """The name from the list of layers on, `h.0.attn.c_attn`; outside of the layers the last part, `lm_head`."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(0, number - 1) :])


def _by_tail(shapes: Mapping[str, LinearShape]) -> dict[str, str]:
    """Name from the list of layers on -> whole name, where that is one module's alone."""
    counts = Counter(within_layers(module) for module in shapes)
    return {tail: module for module in shapes if counts[tail := within_layers(module)] == 1}


def _name(module: str, shapes: Mapping[str, LinearShape], names: Mapping[str, str], tails: Mapping[str, str]) -> str:
    if module in shapes:
        return module
    return names.get(module) or tails.get(within_layers(module)) or module


def _mismatches(adapter: Adapter, shapes: Mapping[str, LinearShape]) -> list[str]:
    problems = []
    for module, update in adapter.updates.items():
        shape = shapes.get(module)
        found = (update.a.shape[1], update.b.shape[0])
        if shape is None:
            problems.append(f"{module}: the model has no linear module of this name")
        elif found != (shape.in_features, shape.out_features):
            problems.append(
                f"{module}: adapter {found[0]} -> {found[1]}, model {shape.in_features} -> {shape.out_features}"
            )
    return problems

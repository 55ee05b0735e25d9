"""Does an adapter belong to a model? Every mismatch of names and shapes at once."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finetune.adapters.adapter import Adapter
from finetune.adapters.naming import transformers_names
from finetune.adapters.store import read_adapter
from finetune.adapters.targets import LinearShape
from finetune.core.errors import ModelError


def read_fitting(path: Path, shapes: Mapping[str, LinearShape]) -> Adapter:
    """Read an adapter of any layout and give its modules PEFT's names, by which `shapes` has the model's.

    Raises ModelError with every module that the model lacks and every shape that does not fit it.
    """
    adapter = read_adapter(path)
    adapter = adapter.renamed(transformers_names(adapter.updates, shapes))
    problems = _mismatches(adapter, shapes)
    if problems:
        raise ModelError("\n  ".join([f"The adapter {path} does not fit the model:", *problems]))
    return adapter


def _mismatches(adapter: Adapter, shapes: Mapping[str, LinearShape]) -> list[str]:
    problems = []
    for module, update in adapter.updates.items():
        shape = shapes.get(module)
        found = (update.a.shape[1], update.b.shape[0])
        if shape is None:
            problems.append(f"{module}: the model has no linear module of this name")
        elif not all(np.isfinite(array).all() for array in update if array is not None):
            problems.append(f"{module}: it has values that are not finite")
        elif found != (shape.in_features, shape.out_features):
            problems.append(
                f"{module}: adapter {found[0]} -> {found[1]}, model {shape.in_features} -> {shape.out_features}"
            )
    return problems

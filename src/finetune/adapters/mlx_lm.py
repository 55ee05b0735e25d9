"""mlx-lm's adapter files: matrices transposed, and a scale in place of alpha.

`adapters.safetensors` has `<module>.lora_a` (in, rank) and `<module>.lora_b` (rank, out);
`adapter_config.json` has `lora_parameters` whose `scale` multiplies B A directly.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate, joined
from finetune.adapters.tensors import read_tensors
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG
from finetune.core.types import FloatArray

WEIGHTS = "adapters.safetensors"
_SUFFIXES = {".lora_a": "a", ".lora_b": "b"}


def read_mlx_lm(directory: Path, document: Mapping[str, Any]) -> Adapter:
    """Read mlx-lm's files, given the content of `adapter_config.json`; modules keep mlx-lm's names.

    Raises ModelError with everything that is wrong.
    """
    problems = []
    if document.get("fine_tune_type", "lora") != "lora":
        problems.append(f"fine_tune_type = {document['fine_tune_type']!r}, and only lora is supported")
    scale = document["lora_parameters"].get("scale")
    if not isinstance(scale, int | float):
        problems.append(f"lora_parameters.scale = {scale!r} is not a number")
    found: dict[str, dict[str, FloatArray]] = {}
    for name, tensor in read_tensors(directory / WEIGHTS).items():
        suffix = next((known for known in _SUFFIXES if name.endswith(known)), None)
        if suffix is None:
            problems.append(f"unexpected tensor {name}")
            continue
        found.setdefault(name[: -len(suffix)], {})[_SUFFIXES[suffix]] = np.ascontiguousarray(tensor.T)
    updates = joined(found, problems)
    if problems:
        raise ModelError("\n  ".join([f"{directory} cannot be used:", *problems]))
    return Adapter(_config(document, updates), updates)


def _config(document: Mapping[str, Any], updates: Mapping[str, LoraUpdate]) -> AdapterConfig:
    """The scale is one for all modules, so alpha follows the rank of each of them."""
    scale = float(document["lora_parameters"]["scale"])
    ranks = {module: int(pair.a.shape[0]) for module, pair in updates.items()}
    rank = int(document["lora_parameters"].get("rank") or next(iter(ranks.values())))
    others = {module: value for module, value in ranks.items() if value != rank}
    return AdapterConfig(
        rank=rank,
        alpha=scale * rank,
        target_modules=tuple(updates),
        base_model=str(document.get("model") or ""),
        dropout=float(document["lora_parameters"].get("dropout") or 0.0),
        rank_pattern=others,
        alpha_pattern={module: scale * value for module, value in others.items()},
    )


def write_mlx_lm(directory: Path, adapter: Adapter, *, layers: int) -> None:
    """Write mlx-lm's two files. Module names must be mlx-lm's; `layers` is the number of layers of the model.

    Raises ModelError where the modules have different ranks or scales: mlx-lm has one of each for all.
    """
    settings = {
        (int(pair.a.shape[0]), adapter.config.scale(module, int(pair.a.shape[0])))
        for module, pair in adapter.updates.items()
    }
    if len(settings) != 1:
        raise ModelError(
            "mlx-lm's format has one rank and one scale for all modules, and this adapter has several. "
            "Export it as peft or merged."
        )
    rank, scale = settings.pop()
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, pair in adapter.updates.items():
        tensors[f"{module}.lora_a"] = np.ascontiguousarray(pair.a.T)
        tensors[f"{module}.lora_b"] = np.ascontiguousarray(pair.b.T)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "mlx"})
    document = {
        "fine_tune_type": "lora",
        "model": adapter.config.base_model,
        "num_layers": layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.config.dropout,
            "keys": sorted({_within_layer(module) for module in adapter.updates}),
        },
    }
    text = json.dumps(document, indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _within_layer(module: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `mlp.up_proj`: mlx-lm names modules relative to their layer."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])

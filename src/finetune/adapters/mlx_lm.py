"""mlx-lm's adapter files: matrices transposed, and a scale in place of alpha.

`adapters.safetensors` has `<module>.lora_a` (in, rank), `<module>.lora_b` (rank, out), and for DoRA `<module>.m`
(out,); `adapter_config.json` has `lora_parameters` with one rank and one scale for all modules. Before that, mlx-lm
and mlx-examples wrote the same tensors into `adapters.npz`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate, joined
from finetune.adapters.lora import alpha_for
from finetune.adapters.mlx_scale import find_scale
from finetune.adapters.one_scale import Uniform, made_uniform, taken_apart
from finetune.adapters.peft import peft_config, peft_document
from finetune.adapters.tensors import read_tensors
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG
from finetune.core.types import FloatArray

WEIGHTS = "adapters.safetensors"
OLD_WEIGHTS = "adapters.npz"
_SUFFIXES = {".lora_a": "a", ".lora_b": "b", ".m": "magnitude"}
_ALL_LAYERS = -1


def read_mlx_lm(weights: Path, document: Mapping[str, Any] | None, *, scale: float | None = None) -> Adapter:
    """Read mlx-lm's files, given the content of `adapter_config.json` (None: there is none).

    Modules keep mlx-lm's names. `scale` is for files that do not say what theirs was. Raises ModelError with
    everything that is wrong.
    """
    kind = _fine_tune_type(document)
    if kind not in ("lora", "dora"):
        raise ModelError(f"{weights.parent} is of fine_tune_type {kind!r}, and only lora and dora are adapters.")
    found = find_scale(document, scale)
    problems = [] if found.problem is None else [found.problem]
    updates = joined(_by_module(read_tensors(weights), problems), problems)
    problems += _magnitude_problems(kind, updates)
    if problems:
        raise ModelError("\n  ".join([f"{weights} cannot be used:", *problems]))
    adapter = _adapter(document or {}, updates, found.value, use_dora=kind == "dora")
    return adapter if found.notice is None else replace(adapter, notices=(f"{weights}: {found.notice}",))


def _fine_tune_type(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return "lora"
    return str(document.get("fine_tune_type") or ("dora" if document.get("use_dora") else "lora"))


def _by_module(tensors: Mapping[str, FloatArray], problems: list[str]) -> dict[str, dict[str, FloatArray]]:
    found: dict[str, dict[str, FloatArray]] = {}
    for name, tensor in tensors.items():
        suffix = next((known for known in _SUFFIXES if name.endswith(known)), None)
        if suffix is None:
            problems.append(f"unexpected tensor {name}")
        else:
            found.setdefault(name[: -len(suffix)], {})[_SUFFIXES[suffix]] = np.ascontiguousarray(tensor.T)
    return found


def _magnitude_problems(kind: str, updates: Mapping[str, LoraUpdate]) -> list[str]:
    wrong = [module for module, update in updates.items() if (kind == "dora") != (update.magnitude is not None)]
    there = "missing" if kind == "dora" else "there"
    return [f"{module}: fine_tune_type is {kind}, and the magnitude m is {there}" for module in wrong]


def _adapter(
    document: Mapping[str, Any], updates: Mapping[str, LoraUpdate], scale: float, *, use_dora: bool
) -> Adapter:
    """The scale is one for all modules, so alpha follows the rank of each of them."""
    if isinstance(document.get("peft"), dict):
        rank = max(update.rank for update in updates.values())
        original = taken_apart(Uniform(updates, rank, scale), peft_config(Path(WEIGHTS), document["peft"]))
        if original is not None:
            return original
    parameters = document.get("lora_parameters", {})
    ranks = {module: update.rank for module, update in updates.items()}
    rank = int(parameters.get("rank") or next(iter(ranks.values())))
    others = {module: value for module, value in ranks.items() if value != rank}
    config = AdapterConfig(
        rank=rank,
        alpha=alpha_for(scale, rank),
        target_modules=tuple(updates),
        base_model=str(document.get("model") or ""),
        dropout=float(parameters.get("dropout") or 0.0),
        use_dora=use_dora,
        rank_pattern=others,
        alpha_pattern={module: alpha_for(scale, value) for module, value in others.items()},
    )
    return Adapter(config, updates)


def write_mlx_lm(directory: Path, adapter: Adapter, *, layers: int | None) -> tuple[str, ...]:
    """Write mlx-lm's two files; return what a person should know about them.

    Module names must be mlx-lm's; `layers` is the number of layers of the model, None where that is not known.
    mlx-lm has one rank and one scale for all modules: others are written as `made_uniform` makes them, and the
    configuration as it was is kept under `peft`, which mlx-lm ignores, so that reading gives the adapter back.
    """
    uniform = made_uniform(adapter)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, update in uniform.updates.items():
        tensors[f"{module}.lora_a"] = np.ascontiguousarray(update.a.T)
        tensors[f"{module}.lora_b"] = np.ascontiguousarray(update.b.T)
        if update.magnitude is not None:
            tensors[f"{module}.m"] = update.magnitude
    save_file(tensors, directory / WEIGHTS, metadata={"format": "mlx"})
    text = json.dumps(_document(adapter, uniform, layers), indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return _notices(adapter, uniform)


def _document(adapter: Adapter, uniform: Uniform, layers: int | None) -> dict[str, object]:
    return {
        "fine_tune_type": "dora" if adapter.config.use_dora else "lora",
        "model": adapter.config.base_model,
        "num_layers": _ALL_LAYERS if layers is None else layers - _first_layer(adapter),
        "lora_parameters": {
            "rank": uniform.rank,
            "scale": uniform.scale,
            "dropout": adapter.config.dropout,
            "keys": sorted({_within_layer(module) for module in adapter.updates}),
        },
        "peft": peft_document(adapter.config),
    }


def _notices(adapter: Adapter, uniform: Uniform) -> tuple[str, ...]:
    notices = []
    padded = sum(update.rank != uniform.rank for update in adapter.updates.values())
    if padded:
        notices.append(
            f"mlx-lm has one rank for all modules: {padded} of {len(adapter.updates)} are filled up with zeros "
            f"to {uniform.rank}, which changes nothing that they compute."
        )
    if uniform.rounded:
        notices.append(
            f"mlx-lm has one scale for all modules: B of {len(uniform.rounded)} of {len(adapter.updates)} modules is "
            "rounded once to float32 (relative error at most 6e-8), so they do not come back bit for bit."
        )
    return tuple(notices)


def _first_layer(adapter: Adapter) -> int:
    """The lowest adapted layer: mlx-lm counts its layers from the last one."""
    numbers = [int(part) for module in adapter.updates for part in module.split(".") if part.isdigit()]
    return min(numbers, default=0)


def _within_layer(module: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `mlp.up_proj`: mlx-lm names modules relative to their layer."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])

"""PEFT's adapter files, which are ours too: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from finetune.adapters.adapter import PREFIX, Adapter, AdapterConfig, LoraUpdate, joined, peft_names
from finetune.adapters.patterns import is_pattern, too_slow
from finetune.adapters.peft_limits import refused_options, refused_tensor
from finetune.adapters.tensors import read_tensors
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.core.types import FloatArray

# PEFT leaves an adapter's name out when it saves; a state dict that was saved by other means still has it.
_TENSOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)\."
    r"(?:lora_(?P<matrix>[AB])(?:\.(?P<name>[^.]+))?\.weight"
    r"|lora_magnitude_vector(?:\.(?!weight$)(?P<of>[^.]+))?(?:\.weight)?)"
)
_SHOWN = 100  # characters of a wrong value
_MATRICES = {"A": "a", "B": "b", None: "magnitude"}


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Write PEFT's two files into `directory`, which is made where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, FloatArray] = {}
    for module, update in adapter.updates.items():
        named = zip(peft_names(module), update, strict=True)
        tensors.update({name: array for name, array in named if array is not None})
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    document = json.dumps(peft_document(adapter.config), indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(document + "\n", encoding="utf-8")


def peft_document(config: AdapterConfig) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in config.alpha_pattern.items()},
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": None,
        "bias": "none",
        "inference_mode": True,
    }


def _plain(value: float) -> int | float:
    """PEFT's own files hold whole alphas as integers."""
    return int(value) if float(value).is_integer() else value


def peft_config(directory: Path, document: Mapping[str, Any]) -> AdapterConfig:
    """What `adapter_config.json` says. Raises ModelError with all that is missing or not plain LoRA."""
    problems = refused_options(document)
    if document.get("peft_type") == "LORA":
        problems += _wrong_values(document)
    if problems:
        raise ModelError("\n  ".join([f"{directory / ADAPTER_CONFIG} cannot be used:", *problems]))
    targets = document.get("target_modules") or ()
    return AdapterConfig(
        rank=document["r"],
        alpha=float(document["lora_alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        base_model=document.get("base_model_name_or_path") or "",
        dropout=float(document.get("lora_dropout") or 0.0),
        use_rslora=bool(document.get("use_rslora")),
        use_dora=bool(document.get("use_dora")),
        rank_pattern=document.get("rank_pattern") or {},
        alpha_pattern={key: float(value) for key, value in (document.get("alpha_pattern") or {}).items()},
        fan_in_fan_out=bool(document.get("fan_in_fan_out")),
    )


def _wrong_values(document: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(document.get("r")):
        problems.append(f"r = {document.get('r')!r} is not a rank")
    if not _is_alpha(document.get("lora_alpha")):
        problems.append(f"lora_alpha = {document.get('lora_alpha')!r} is not a scale numerator")
    targets = document.get("target_modules") or ()
    if not isinstance(targets, str) and not _are_names(targets):
        problems.append(f"target_modules = {_short(targets)} is neither a pattern nor a list of names")
    for key, fits, kind in (("rank_pattern", _is_rank, "rank"), ("alpha_pattern", _is_alpha, "scale numerator")):
        pattern = document.get(key) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{key} = {pattern!r} is not a mapping")
            continue
        problems += [f"{key}: {_short(name)} is no pattern" for name in pattern if not is_pattern(name)]
        problems += [f"{key}: {value!r} is not a {kind}" for value in pattern.values() if not fits(value)]
    return problems


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value != 0


def read_peft(weights: Path, document: Mapping[str, Any]) -> Adapter:
    """Read the weights, given the content of `adapter_config.json`. Raises ModelError with all that is wrong."""
    config = peft_config(weights.parent, document)
    problems: list[str] = []
    updates = joined(_by_module(read_tensors(weights), problems), problems)
    slow = too_slow((*config.rank_pattern, *config.alpha_pattern), updates)
    problems.extend(slow or _contradictions(config, updates))
    if problems:
        raise ModelError("\n  ".join([f"{weights} cannot be used:", *problems]))
    return Adapter(config, updates)


def _by_module(tensors: Mapping[str, FloatArray], problems: list[str]) -> dict[str, dict[str, FloatArray]]:
    found: dict[str, dict[str, FloatArray]] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            problems.append(refused_tensor(key))
            continue
        names.add(match["name"] or match["of"] or "")
        found.setdefault(match["module"], {})[_MATRICES[match["matrix"]]] = tensor
    if len(names) > 1:
        listed = ", ".join(repr(name) for name in sorted(names))
        problems.append(f"it holds several adapters ({listed}). Save each of them in a directory of its own")
    return found


def _contradictions(config: AdapterConfig, updates: Mapping[str, LoraUpdate]) -> list[str]:
    """What the weights contradict in the configuration."""
    found = []
    for module, update in updates.items():
        if update.rank != config.rank_of(module):
            found.append(f"{module}: rank {update.rank}, and the configuration says {config.rank_of(module)}")
        if config.use_dora != (update.magnitude is not None):
            there = "missing" if update.magnitude is None else "there"
            found.append(f"{module}: use_dora is {config.use_dora}, and the magnitude is {there}")
    return found

"""PEFT's adapter files, which are ours too: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from finetune.adapters.adapter import PREFIX, Adapter, AdapterConfig, LoraUpdate, joined, peft_names
from finetune.adapters.tensors import read_tensors
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.core.types import FloatArray

_SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "magnitude"}


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Write PEFT's two files into `directory`, which is made where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, FloatArray] = {}
    for module, update in adapter.updates.items():
        named = zip(peft_names(module), update, strict=True)
        tensors.update({name: array for name, array in named if array is not None})
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    document = json.dumps(_peft_document(adapter.config), indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(document + "\n", encoding="utf-8")


def _peft_document(config: AdapterConfig) -> dict[str, Any]:
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
    """What `adapter_config.json` says. Raises ModelError for what is missing or not LoRA."""
    problems = _unsupported(document)
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        problems.append(f"r = {rank!r} is not a rank")
    if not isinstance(alpha, int | float):
        problems.append(f"lora_alpha = {alpha!r} is not a number")
    if problems or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ModelError(f"{directory / ADAPTER_CONFIG} cannot be used: {'; '.join(problems)}.")
    targets = document.get("target_modules") or ()
    return AdapterConfig(
        rank=rank,
        alpha=float(alpha),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        base_model=document.get("base_model_name_or_path") or "",
        dropout=float(document.get("lora_dropout") or 0.0),
        use_rslora=bool(document.get("use_rslora")),
        use_dora=bool(document.get("use_dora")),
        rank_pattern=document.get("rank_pattern") or {},
        alpha_pattern=document.get("alpha_pattern") or {},
        fan_in_fan_out=bool(document.get("fan_in_fan_out")),
    )


def _unsupported(document: Mapping[str, Any]) -> list[str]:
    problems = []
    if document.get("peft_type") != "LORA":
        problems.append(f"peft_type = {document.get('peft_type')!r}, and only LORA is supported")
    if document.get("modules_to_save"):
        problems.append(f"modules_to_save = {document['modules_to_save']!r}, and only adapters can be loaded")
    if document.get("bias", "none") != "none":
        problems.append(f"bias = {document['bias']!r}, and trained biases are not supported")
    return problems


def read_peft(directory: Path, document: Mapping[str, Any]) -> Adapter:
    """Read the weights, given the content of `adapter_config.json`. Raises ModelError with all that is wrong."""
    config = peft_config(directory, document)
    path = directory / ADAPTER_WEIGHTS
    found: dict[str, dict[str, FloatArray]] = {}
    problems = []
    for name, tensor in read_tensors(path).items():
        suffix = next((known for known in _SUFFIXES if name.endswith(known)), None)
        if suffix is None or not name.startswith(PREFIX):
            problems.append(f"unexpected tensor {name}")
            continue
        found.setdefault(name[len(PREFIX) : -len(suffix)], {})[_SUFFIXES[suffix]] = tensor
    updates = joined(found, problems)
    problems.extend(_problems(config, updates))
    if problems:
        raise ModelError("\n  ".join([f"{path} cannot be used:", *problems]))
    return Adapter(config, updates)


def _problems(config: AdapterConfig, updates: Mapping[str, LoraUpdate]) -> list[str]:
    """What the weights contradict in the configuration."""
    found = []
    for module, update in updates.items():
        if update.rank != config.rank_of(module):
            found.append(f"{module}: rank {update.rank}, and the configuration says {config.rank_of(module)}")
        if config.use_dora != (update.magnitude is not None):
            found.append(f"{module}: use_dora is {config.use_dora}, and the magnitude is {_found(update)}")
    return found


def _found(update: LoraUpdate) -> str:
    return "missing" if update.magnitude is None else "there"

"""Write a tuned model in the layout of one of its readers. Each function fills a directory that it may create."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from finetune.adapters import naming
from finetune.adapters.adapter import Adapter, compact_targets, peft_names
from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.naming import require_alike, stores_transposed
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import adapter_files, read_adapter, read_document
from finetune.adapters.tensors import NPZ, tensor_names
from finetune.core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS

ExportFormat: TypeAlias = Literal["peft", "mlx", "merged", "gguf", "gguf-lora"]
GGUF_FORMATS: frozenset[ExportFormat] = frozenset({"gguf", "gguf-lora"})
_NEEDS_BASE = "Give the base with --model."


def write_peft(path: Path, destination: Path, *, base: str, available: Iterable[str], model_type: str) -> None:
    """PEFT's two files, with the base's name in the configuration.

    Weights that are PEFT's already are copied as they are. `available` are the base's linear modules and
    `model_type` its architecture, by which other names are translated; empty where the base is not known.
    """
    adapter = read_adapter(path)
    weights, *rest = adapter_files(path)
    destination.mkdir(parents=True, exist_ok=True)
    if rest and _has_plain_names(weights, adapter):
        shutil.copyfile(weights, destination / ADAPTER_WEIGHTS)
        document = read_document(weights.parent)
    else:
        write_adapter(destination, _for_peft(adapter, available, model_type))
        document = read_document(destination)
    _write_json(destination / ADAPTER_CONFIG, {**document, "base_model_name_or_path": base})


def _has_plain_names(weights: Path, adapter: Adapter) -> bool:
    """Whether a file holds PEFT's tensors by the names under which PEFT saves and loads them."""
    if weights.suffix == NPZ:
        return False
    expected = {
        name
        for module, update in adapter.updates.items()
        for name, array in zip(peft_names(module), update, strict=True)
        if array is not None
    }
    return tensor_names(weights) == expected


def _for_peft(adapter: Adapter, available: Iterable[str], model_type: str) -> Adapter:
    known = list(available)
    if not known:
        require_alike(adapter.updates, _NEEDS_BASE)
    named = adapter.renamed(naming.transformers_names(adapter.updates, known)) if known else adapter
    config = replace(named.config, fan_in_fan_out=named.config.fan_in_fan_out or stores_transposed(model_type))
    if known and not isinstance(config.target_modules, str):
        config = replace(config, target_modules=compact_targets(named.updates, known))
    return replace(named, config=config)


def write_mlx(
    path: Path, destination: Path, *, base: str, layers: int | None, names: Mapping[str, str]
) -> tuple[str, ...]:
    """mlx-lm's two files; returns what a person should know about them.

    `layers` is the base's number of layers, None where the base is not known. `names` maps PEFT's names of
    modules to mlx-lm's.
    """
    adapter = read_adapter(path).renamed(names)
    notices = write_mlx_lm(destination, adapter, layers=layers)
    _write_json(destination / ADAPTER_CONFIG, {**read_document(destination), "model": base})
    return notices


def copy_model(model: Path, destination: Path) -> None:
    """A model that is whole already (full fine-tuning): its files, without what a checkpoint adds for resuming."""
    training_only = shutil.ignore_patterns("optimizer.safetensors", "state.json", "MANIFEST.json")
    shutil.copytree(model, destination, ignore=training_only, dirs_exist_ok=True)


def stored_type(model: Path) -> str:
    """The type in which a model directory keeps its weights, from config.json; float32 where it does not say."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return named.removeprefix("torch.")


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether the files of a model are quantised, from its config.json."""
    return bool(config.get("quantization") or config.get("quantization_config"))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Write a tuned model in the layout of one of its readers. Each function fills a directory that it may create."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from finetune.adapters.adapter import Adapter
from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import read_adapter, read_document
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS

ExportFormat: TypeAlias = Literal["peft", "mlx", "merged"]


def write_peft(adapter: Path, destination: Path, *, base: str) -> None:
    """PEFT's two files, with the base's name in the configuration. Weights of a PEFT adapter are copied as they are."""
    document = read_document(adapter)
    if "peft_type" not in document:
        write_adapter(destination, read_adapter(adapter))
        document = read_document(destination)
    else:
        read_adapter(adapter)  # raises for what is damaged
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter / ADAPTER_WEIGHTS, destination / ADAPTER_WEIGHTS)
    _write_json(destination / ADAPTER_CONFIG, {**document, "base_model_name_or_path": base})


def write_mlx(
    adapter: Path, destination: Path, *, base: str, model_config: Mapping[str, Any], paths: Mapping[str, str]
) -> None:
    """mlx-lm's two files. `model_config` is the base's config.json, for its number of layers.

    `paths` maps PEFT's names of modules to mlx-lm's; a name that it lacks is mlx-lm's already.
    """
    layers = model_config.get("num_hidden_layers", model_config.get("n_layer"))
    if not isinstance(layers, int):
        raise ModelError("The base's config.json names no number of layers (num_hidden_layers), which mlx-lm needs.")
    read = read_adapter(adapter)
    pairs = {paths.get(module, module): pair for module, pair in read.updates.items()}
    alphas = {paths.get(module, module): alpha for module, alpha in read.config.alpha_pattern.items()}
    write_mlx_lm(destination, Adapter(replace(read.config, alpha_pattern=alphas), pairs), layers=layers)
    _write_json(destination / ADAPTER_CONFIG, {**read_document(destination), "model": base})


def copy_model(model: Path, destination: Path) -> None:
    """A model that is whole already (full fine-tuning): its files, without what a checkpoint adds for resuming."""
    training_only = shutil.ignore_patterns("optimizer.safetensors", "state.json", "MANIFEST.json")
    shutil.copytree(model, destination, ignore=training_only, dirs_exist_ok=True)


def stored_type(model: Path) -> str:
    """The type in which a model directory keeps its weights, from config.json; float32 where it does not say."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return named.removeprefix("torch.")


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Adapters on disk, in whichever layout `adapter_config.json` says: PEFT's (ours too) or mlx-lm's."""

import json
from pathlib import Path
from typing import Any

from finetune.adapters.adapter import Adapter, AdapterConfig
from finetune.adapters.mlx_lm import read_mlx_lm
from finetune.adapters.peft import peft_config, read_peft
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG


def is_adapter(directory: Path) -> bool:
    """True where the directory holds an adapter of a layout that `read_adapter` reads."""
    return (directory / ADAPTER_CONFIG).is_file()


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter of PEFT's or mlx-lm's layout, whichever `adapter_config.json` says.

    Raises ModelError for what is missing, damaged, or not LoRA, everything at once.
    """
    document = read_document(directory)
    if "peft_type" in document:
        return read_peft(directory, document)
    if "lora_parameters" in document:
        return read_mlx_lm(directory, document)
    raise ModelError(
        f"{directory / ADAPTER_CONFIG} is neither PEFT's (no peft_type) nor mlx-lm's (no lora_parameters). "
        "Give the directory of a LoRA adapter."
    )


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Only the configuration, without the weights (PEFT's layout or mlx-lm's)."""
    document = read_document(directory)
    if "peft_type" in document:
        return peft_config(directory, document)
    return read_adapter(directory).config


def read_document(directory: Path) -> dict[str, Any]:
    """`adapter_config.json` as it is."""
    path = directory / ADAPTER_CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{directory} holds no {ADAPTER_CONFIG}. Give the directory of an adapter.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the adapter again.") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object. Copy the adapter again.")
    return document

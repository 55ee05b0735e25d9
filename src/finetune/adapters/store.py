"""Adapters on disk, in whichever layout they are: PEFT's (ours too), mlx-lm's, or mlx-examples' `adapters.npz`.

An adapter is named by its directory, or by one of several weight files in it, such as mlx-lm's checkpoints.
"""

from pathlib import Path
from typing import Any, NamedTuple

from finetune.adapters.adapter import Adapter, AdapterConfig
from finetune.adapters.mlx_lm import OLD_WEIGHTS, WEIGHTS, read_mlx_lm
from finetune.adapters.peft import peft_config, read_peft
from finetune.adapters.tensors import NPZ
from finetune.core.errors import ModelError
from finetune.core.files import read_json
from finetune.core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_WEIGHT_SUFFIXES = (".safetensors", NPZ)


class _Place(NamedTuple):
    """Where an adapter's parts lie."""

    directory: Path
    weights: Path | None  # a file that was named, or the only one there may be; None: what the layout calls them
    document: dict[str, Any] | None  # adapter_config.json; None: there is none, as beside old .npz files


def is_adapter(path: Path) -> bool:
    """True where `path` is an adapter of a layout that `read_adapter` reads: its directory, or its weights."""
    if path.is_dir():
        return (path / ADAPTER_CONFIG).is_file() or (path / OLD_WEIGHTS).is_file()
    beside = path.with_name(ADAPTER_CONFIG)
    return path.is_file() and (path.suffix == NPZ or (path.suffix in _WEIGHT_SUFFIXES and beside.is_file()))


def read_adapter(path: Path, *, scale: float | None = None) -> Adapter:
    """Read an adapter of any layout; modules keep the names that it gives them.

    `scale` is what B A is multiplied by, for files of mlx-lm that do not say it. Raises ModelError for what is
    missing, damaged, or not LoRA, everything at once.
    """
    place = _find(path)
    if place.document is not None and "peft_type" in place.document:
        if scale is not None:
            raise ModelError(f"--scale {scale:g}: PEFT's files say their scale (r, lora_alpha). Leave it out.")
        return read_peft(place.weights or place.directory / ADAPTER_WEIGHTS, place.document)
    if place.document is None or isinstance(place.document.get("lora_parameters"), dict):
        return read_mlx_lm(place.weights or _mlx_weights(place.directory), place.document, scale=scale)
    kind = place.document.get("fine_tune_type")
    raise ModelError(
        f"{place.directory / ADAPTER_CONFIG} is neither PEFT's (no peft_type) nor mlx-lm's (no lora_parameters)"
        + (f"; fine_tune_type is {kind!r}" if kind else "")
        + ". Give the directory of a LoRA adapter."
    )


def read_adapter_config(path: Path) -> AdapterConfig:
    """Only the configuration, without PEFT's weights; mlx-lm's files say part of it by their tensors alone."""
    place = _find(path)
    if place.document is not None and "peft_type" in place.document:
        return peft_config(place.directory, place.document)
    return read_adapter(path).config


def named_base(path: Path) -> str:
    """The base model that the adapter's files name; empty where they name none."""
    document = _find(path).document or {}
    key = "base_model_name_or_path" if "peft_type" in document else "model"
    return str(document.get(key) or "")


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The files that make up an adapter, the weights first."""
    place = _find(path)
    is_peft = place.document is not None and "peft_type" in place.document
    weights = place.weights or (place.directory / ADAPTER_WEIGHTS if is_peft else _mlx_weights(place.directory))
    return (weights,) if place.document is None else (weights, place.directory / ADAPTER_CONFIG)


def _find(path: Path) -> _Place:
    if path.is_file():
        if path.suffix not in _WEIGHT_SUFFIXES:
            raise ModelError(f"{path} holds no adapter. Give its directory, or a .safetensors or .npz file in one.")
        directory, weights = path.parent, path
    else:
        directory, weights = path, None
    if (directory / ADAPTER_CONFIG).is_file():
        return _Place(directory, weights, read_document(directory))
    old = weights or directory / OLD_WEIGHTS
    if old.suffix == NPZ and old.is_file():
        return _Place(directory, old, None)
    raise ModelError(f"{directory} holds no {ADAPTER_CONFIG}. Give the directory of an adapter.")


def _mlx_weights(directory: Path) -> Path:
    old = directory / OLD_WEIGHTS
    return old if old.is_file() and not (directory / WEIGHTS).is_file() else directory / WEIGHTS


def read_document(directory: Path) -> dict[str, Any]:
    """`adapter_config.json` as it is."""
    path = directory / ADAPTER_CONFIG
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{directory} holds no {ADAPTER_CONFIG}. Give the directory of an adapter.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the adapter again.") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object. Copy the adapter again.")
    return document

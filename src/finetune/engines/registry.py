"""Chooses an engine for a configuration, and refuses what it cannot do before anything is loaded."""

import importlib.util
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from finetune.config.schema import ModelConfig, RunConfig
from finetune.core.errors import ConfigError, ModelError, UsageError
from finetune.engines.base import Engine, Feature, Packer
from finetune.engines.features import FEATURES
from finetune.models.source import find_directory, read_config

EngineName: TypeAlias = Literal["mlx", "pytorch"]

ENGINES: tuple[EngineName, ...] = ("mlx", "pytorch")
LIBRARY: Mapping[EngineName, str] = {"mlx": "mlx", "pytorch": "torch"}
HOW_TO_INSTALL: Mapping[EngineName, str] = {
    "mlx": "Install MLX: `pip install mlx` on Apple silicon, `pip install 'mlx[cpu]'` on Linux.",
    "pytorch": (
        "Install PyTorch: `pip install 'finetune[torch]'`. On a machine without an NVIDIA card, "
        "`pip install torch --index-url https://download.pytorch.org/whl/cpu` first spares gigabytes of CUDA packages."
    ),
}


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine runs, and why: a phrase to put in brackets."""

    name: EngineName
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(model: ModelConfig) -> EngineChoice:
    """The engine that `model.backend` names. Imports no engine's library.

    `auto` is MLX on Apple silicon and for files that only MLX reads; elsewhere PyTorch where it is installed, because
    MLX's matrix products on Linux CPUs are slower, and else MLX.
    """
    if model.backend != "auto":
        return EngineChoice(model.backend, f"model.backend={model.backend}")
    if on_apple_silicon():
        return EngineChoice("mlx", "auto: the faster one on Apple silicon")
    if _quantised_for_mlx(model):
        return EngineChoice("mlx", "auto: the files of this model are quantised for MLX")
    if is_installed("pytorch"):
        return EngineChoice("pytorch", "auto: PyTorch is installed, and this is not Apple silicon")
    return EngineChoice("mlx", "auto: PyTorch, faster on this machine, is not installed")


def choose_engine(model: ModelConfig) -> Engine:
    """The engine of `choose`, ready to use. Imports the engine's library.

    Raises UsageError with what to install where the library is not there, and ConfigError where this machine
    cannot do what `model.device` and `model.dtype` ask for.
    """
    engine = load_engine(choose(model))
    problems = engine.hardware_problems(model)
    if problems:
        raise ConfigError("The configuration", problems)
    return engine


def load_engine(choice: EngineChoice) -> Engine:
    """Import the library of an engine that was chosen. Raises UsageError where that fails."""
    if not is_installed(choice.name):
        raise UsageError(
            f"The {choice.name} engine ({choice.reason}) cannot run: {LIBRARY[choice.name]} is not installed. "
            f"{HOW_TO_INSTALL[choice.name]}"
        )
    try:
        if choice.name == "mlx":
            from finetune.engines.mlx.engine import MLXEngine

            return MLXEngine()
        from finetune.engines.torch.engine import TorchEngine

        return TorchEngine()
    except (ImportError, OSError) as error:  # OSError: a shared library of the wheel that this machine lacks
        raise UsageError(
            f"The {choice.name} engine ({choice.reason}) cannot be loaded: {error}. {HOW_TO_INSTALL[choice.name]}"
        ) from error


def load_packer() -> Packer:
    """What writes MLX's quantised files, whichever engine trained. Raises UsageError where MLX is not installed."""
    load_engine(EngineChoice("mlx", "MLX's files are written by MLX"))
    from finetune.engines.mlx.packed_copy import write_packed

    return write_packed


def is_installed(name: EngineName) -> bool:
    """Whether the engine's library can be found; it is not imported."""
    return importlib.util.find_spec(LIBRARY[name]) is not None


def on_apple_silicon() -> bool:
    """Whether MLX computes with Metal here."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _quantised_for_mlx(model: ModelConfig) -> bool:
    """Whether the model is there and its config.json describes MLX's packed weights."""
    try:
        return isinstance(read_config(find_directory(model.name, model.revision)).get("quantization"), dict)
    except ModelError:
        return False


def needed_features(config: RunConfig) -> frozenset[Feature]:
    """What an engine must be able to do to run this configuration."""
    needed = {Feature(config.training.method)}
    if config.training.packing:
        needed.add(Feature.PACKING)
    if config.model.quantization is not None:
        needed.add(Feature.QUANTIZATION)
    if config.training.gradient_checkpointing:
        needed.add(Feature.GRADIENT_CHECKPOINTING)
    return frozenset(needed)


_OPTIONS = {
    Feature.LORA: "training.method=lora",
    Feature.DORA: "training.method=dora",
    Feature.FULL: "training.method=full",
    Feature.QUANTIZATION: "model.quantization",
    Feature.GRADIENT_CHECKPOINTING: "training.gradient_checkpointing",
    Feature.PACKING: "training.packing",
}


def require(engine: str, features: Iterable[Feature]) -> None:
    """Refuse, with a ConfigError that names every option, what the engine lacks, and say which engine has it."""
    missing = sorted(set(features) - FEATURES[engine])
    if missing:
        raise ConfigError("The configuration", [_refusal(engine, feature) for feature in missing])


def _refusal(engine: str, feature: Feature) -> str:
    able = [name for name in ENGINES if feature in FEATURES[name]]
    if not able:
        return f"{_OPTIONS[feature]}: no engine of this version can do it. Leave it out."
    sentence = f"{_OPTIONS[feature]}: the {engine} engine of this version cannot do it; the {able[0]} engine can. "
    if is_installed(able[0]):
        return f"{sentence}Set model.backend: {able[0]}, or leave it out."
    return f"{sentence}Set model.backend: {able[0]}, or leave it out. {HOW_TO_INSTALL[able[0]]}"

"""Chooses an engine for a configuration, and refuses what it cannot do before anything is loaded."""

from collections.abc import Iterable

from finetune.config.schema import ModelConfig, RunConfig
from finetune.core.errors import ConfigError, UsageError
from finetune.engines.base import Engine, Feature


def choose_engine(model: ModelConfig) -> Engine:
    """The engine that `model.backend` names; `auto` is MLX.

    Imports the engine's library. Raises UsageError for an engine that this version does not have, or whose
    library is not installed.
    """
    if model.backend == "pytorch":
        raise UsageError(
            "model.backend=pytorch: this version has no PyTorch engine yet. Use model.backend=mlx, or leave it out."
        )
    try:
        from finetune.engines.mlx.engine import MLXEngine
    except ImportError as error:
        raise UsageError(
            f"The MLX engine cannot be loaded: {error}. Install it with `pip install mlx` on Apple silicon, "
            "`pip install 'mlx[cpu]'` on Linux."
        ) from error
    return MLXEngine()


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


def require(engine: Engine, features: Iterable[Feature]) -> None:
    """Refuse, with a ConfigError that names every option, what the engine lacks."""
    missing = sorted(set(features) - engine.features)
    if missing:
        problems = [
            f"{_OPTIONS[feature]}: the {engine.name} engine of this version cannot do it. Leave it out."
            for feature in missing
        ]
        raise ConfigError("The configuration", problems)

"""Training that starts from an adapter: its rank, scale, targets and method take the place of what is not given."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from finetune.adapters.adapter import Adapter
from finetune.adapters.naming import within_layers
from finetune.adapters.store import adapter_files, read_adapter
from finetune.adapters.targets import ends_in, rank_of
from finetune.config.layers import short
from finetune.config.load import LoadedConfig, plain, value_of
from finetune.config.schema import LoraConfig, RunConfig
from finetune.config.sources import Layer
from finetune.core.errors import ConfigError
from finetune.core.files import sha256_of

Given: TypeAlias = Callable[[str], str | None]
"""Key -> how an error names its value; None where nobody gave one."""


def settled(config: RunConfig | LoadedConfig) -> RunConfig:
    """The configuration with what the adapter of `lora.init_from` says; as it is where there is none.

    Raises ConfigError with every option that says otherwise than the adapter, ModelError where it cannot be read.
    """
    settings = plain(config)
    if settings.lora.init_from is None:
        return settings
    adapter = read_adapter(Path(settings.lora.init_from).expanduser())
    problems = _contradictions(settings, adapter, _given(config))
    if problems:
        raise ConfigError("The configuration", problems)
    return _with(settings, adapter, keep_targets=_given(config)("lora.target_modules") is not None)


def fingerprint(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the files of the adapter that training starts from, by their names; empty where there is none."""
    if config.lora.init_from is None:
        return {}
    return {file.name: sha256_of(file) for file in adapter_files(Path(config.lora.init_from).expanduser())}


def starting_notices(config: RunConfig) -> tuple[str, ...]:
    """Where the adapter's values come from, and what its files leave open."""
    if config.lora.init_from is None:
        return ()
    adapter = read_adapter(Path(config.lora.init_from).expanduser())
    lora = config.lora
    said = f"rank {lora.rank}, alpha {lora.effective_alpha:g}, {len(adapter.updates)} modules"
    return (f"Training starts from {lora.init_from} ({config.training.method}): {said}.", *adapter.notices)


def _given(config: RunConfig | LoadedConfig) -> Given:
    if isinstance(config, LoadedConfig):
        return lambda key: config.describe(key) if config.sources[key].layer > Layer.PROFILE else None

    def named(key: str) -> str | None:
        section, _, name = key.partition(".")
        chosen = name in getattr(config, section).model_fields_set
        return f"{key} = {short(value_of(config, key))}" if chosen else None

    return named


def _contradictions(config: RunConfig, adapter: Adapter, given: Given) -> list[str]:
    """Options that were given and are not the adapter's."""
    of_adapter = {
        "training.method": _method(adapter),
        "lora.rank": adapter.config.rank,
        "lora.alpha": adapter.config.alpha,
        "lora.use_rslora": adapter.config.use_rslora,
    }
    wrong = {key: str(value) for key, value in of_adapter.items() if value_of(config, key) not in (None, value)}
    ranks = {module: update.rank for module, update in adapter.updates.items()}
    if any(rank_of(module, config.lora.rank_pattern, adapter.config.rank) != rank for module, rank in ranks.items()):
        wrong["lora.rank_pattern"] = short(_ranks(adapter)) if _ranks(adapter) else "one rank for all"
    if not _meant(config.lora, list(adapter.updates)):
        wrong["lora.target_modules"] = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in adapter.updates}))
    return [
        f"{value}, and the adapter to start from ({config.lora.init_from}) has {wrong[key]}. Remove it."
        for key in wrong
        if (value := given(key)) is not None
    ]


def _method(adapter: Adapter) -> str:
    return "dora" if adapter.config.use_dora else "lora"


def _meant(lora: LoraConfig, modules: list[str]) -> bool:
    """Whether the targets can be these modules; the engine, which knows the model, compares them one by one."""
    targets = lora.target_modules
    if targets == "all-linear":
        return True
    return all(any(ends_in(module, target) for module in modules) for target in targets) and all(
        any(ends_in(module, target) for target in targets) for module in modules
    )


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The ranks that are not the common one, by names that are the same in every library."""
    common = adapter.config.rank
    return {within_layers(name): update.rank for name, update in adapter.updates.items() if update.rank != common}


def _with(config: RunConfig, adapter: Adapter, *, keep_targets: bool) -> RunConfig:
    values: Mapping[str, Any] = {
        "rank": adapter.config.rank,
        "alpha": adapter.config.alpha,
        "use_rslora": adapter.config.use_rslora,
        "rank_pattern": _ranks(adapter),
        "target_modules": config.lora.target_modules if keep_targets else tuple(map(within_layers, adapter.updates)),
    }
    return config.model_copy(
        update={
            "lora": config.lora.model_copy(update=values),
            "training": config.training.model_copy(update={"method": _method(adapter)}),
        }
    )

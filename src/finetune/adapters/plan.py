"""From the configuration to the adapters of one model, the same for every engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from finetune.adapters.adapter import AdapterConfig, LoraUpdate, compact_targets
from finetune.adapters.fitting import read_fitting
from finetune.adapters.lora import AdapterInit
from finetune.adapters.targets import SOURCE, LinearShape, choose_ranks
from finetune.config.schema import LoraConfig
from finetune.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Which modules (PEFT's names, in the model's order) get an adapter, of which rank and scale."""

    config: AdapterConfig
    ranks: Mapping[str, int]
    shapes: Mapping[str, LinearShape]  # of the adapted modules
    start: Mapping[str, LoraUpdate] = field(default_factory=dict)  # of an adapter that training goes on from

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        return self.config.scale(module, self.ranks[module])

    def initial(self, init: AdapterInit) -> dict[str, LoraUpdate]:
        """The adapter to start from, or A as `init` draws it and B zero.

        DoRA's magnitudes are the norms of the base's rows where an update has none yet: the engine's part.
        """
        if self.start:
            return dict(self.start)
        updates = {}
        for module, rank in self.ranks.items():
            shape = self.shapes[module]
            b = np.zeros((shape.out_features, rank), np.float32)
            updates[module] = LoraUpdate(init(module, rank, shape.in_features), b)
        return updates


def plan_adapters(
    lora: LoraConfig, *, use_dora: bool, available: Mapping[str, LinearShape], base_model: str, fan_in_fan_out: bool
) -> AdapterPlan:
    """Choose modules and ranks among `available`. Raises ConfigError with every problem at once.

    With `lora.init_from` they are that adapter's, and the other options must say the same; ModelError where it
    does not fit the model.
    """
    if lora.init_from is not None:
        return _continued(lora, Path(lora.init_from), available, base_model=base_model, transposes=fan_in_fan_out)
    ranks = choose_ranks(lora, available)
    config = AdapterConfig(
        rank=lora.rank,
        alpha=lora.effective_alpha,
        target_modules=compact_targets(ranks, available),
        base_model=base_model,
        dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=use_dora,
        rank_pattern={module: rank for module, rank in ranks.items() if rank != lora.rank},
        fan_in_fan_out=fan_in_fan_out,
    )
    return AdapterPlan(config, ranks, {module: available[module] for module in ranks})


def _continued(
    lora: LoraConfig, path: Path, available: Mapping[str, LinearShape], *, base_model: str, transposes: bool
) -> AdapterPlan:
    adapter = read_fitting(path, available)
    start = {module: adapter.updates[module] for module in available if module in adapter.updates}
    ranks = {module: update.rank for module, update in start.items()}
    expected = choose_ranks(lora, available)
    if expected != ranks:
        both = f"{len(expected)} modules ({_last(expected)}), and the adapter {path} has {len(ranks)} ({_last(ranks)})"
        raise ConfigError(SOURCE, [f"lora.target_modules and lora.rank mean {both}. Remove them."])
    config = replace(
        adapter.config,
        base_model=base_model,
        dropout=lora.dropout,
        target_modules=compact_targets(start, available),
        fan_in_fan_out=transposes,
    )
    return AdapterPlan(config, ranks, {module: available[module] for module in start}, start)


def _last(modules: Mapping[str, int]) -> str:
    return ", ".join(sorted({module.rsplit(".", 1)[-1] for module in modules}))

"""From the configuration to the adapters of one model, the same for every engine."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from finetune.adapters.adapter import AdapterConfig, LoraUpdate, compact_targets
from finetune.adapters.lora import AdapterInit
from finetune.adapters.targets import LinearShape, choose_ranks
from finetune.config.schema import LoraConfig


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Which modules (PEFT's names, in the model's order) get an adapter, of which rank and scale."""

    config: AdapterConfig
    ranks: Mapping[str, int]
    shapes: Mapping[str, LinearShape]  # of the adapted modules

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        return self.config.scale(module, self.ranks[module])

    def initial(self, init: AdapterInit) -> dict[str, LoraUpdate]:
        """A as `init` draws it and B zero. DoRA's magnitudes are the norms of the base's rows: the engine's part."""
        updates = {}
        for module, rank in self.ranks.items():
            shape = self.shapes[module]
            b = np.zeros((shape.out_features, rank), np.float32)
            updates[module] = LoraUpdate(init(module, rank, shape.in_features), b)
        return updates


def plan_adapters(
    lora: LoraConfig, *, use_dora: bool, available: Mapping[str, LinearShape], base_model: str, fan_in_fan_out: bool
) -> AdapterPlan:
    """Choose modules and ranks among `available`. Raises ConfigError with every problem at once."""
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

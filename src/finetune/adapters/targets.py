"""Which modules get an adapter, and of which rank. Names are PEFT's: paths such as `model.layers.0.mlp.up_proj`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.config.schema import LoraConfig
from finetune.core.errors import ConfigError

SOURCE = "The LoRA configuration"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear module that could be adapted. `is_head` marks the output projection, left out by `all-linear`."""

    in_features: int
    out_features: int
    is_head: bool = False


def ends_in(module: str, name: str) -> bool:
    """True where `name` is the module's path or its last components."""
    return module == name or module.endswith(f".{name}")


def choose_ranks(lora: LoraConfig, available: Mapping[str, LinearShape]) -> dict[str, int]:
    """Module path -> rank for all that `lora` targets, in the model's order.

    Raises ConfigError with every problem at once: a target or a rank_pattern that matches nothing (with the names
    that exist), a rank above a module's width.
    """
    problems: list[str] = []
    modules = _targets(lora, available, problems)
    ranks = {module: rank_of(module, lora.rank_pattern, lora.rank) for module in modules}
    for pattern in lora.rank_pattern:
        if not any(ends_in(module, pattern) for module in modules):
            problems.append(_unmatched("lora.rank_pattern", pattern, modules or list(available)))
    problems.extend(_too_wide(ranks, available))
    if problems:
        raise ConfigError(SOURCE, problems)
    return ranks


def _targets(lora: LoraConfig, available: Mapping[str, LinearShape], problems: list[str]) -> list[str]:
    if lora.target_modules == "all-linear":
        return [module for module, shape in available.items() if not shape.is_head]
    for target in lora.target_modules:
        if not any(ends_in(module, target) for module in available):
            problems.append(_unmatched("lora.target_modules", target, list(available)))
    return [module for module in available if any(ends_in(module, target) for target in lora.target_modules)]


def rank_of(module: str, patterns: Mapping[str, int], common: int) -> int:
    """The rank of the longest pattern that the module's name ends in, else the common one."""
    matching = [pattern for pattern in patterns if ends_in(module, pattern)]
    return patterns[max(matching, key=len)] if matching else common


def _too_wide(ranks: Mapping[str, int], available: Mapping[str, LinearShape]) -> list[str]:
    """One sentence for all modules of one shape: a deep model repeats each of them in every layer."""
    shapes: dict[tuple[str, int, int], int] = {}
    for module, rank in ranks.items():
        width = min(available[module].in_features, available[module].out_features)
        if rank > width:
            name = module.rsplit(".", 1)[-1]
            shapes[name, rank, width] = shapes.get((name, rank, width), 0) + 1
    return [
        f"lora.rank={rank} is more than the width {width} of {name} ({count} modules). Choose at most {width}."
        for (name, rank, width), count in shapes.items()
    ]


def _unmatched(key: str, value: str, available: Sequence[str]) -> str:
    names = sorted({module.rsplit(".", 1)[-1] for module in available})
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key}: {value!r} matches no linear module.{hint} The model has: {', '.join(names)}."

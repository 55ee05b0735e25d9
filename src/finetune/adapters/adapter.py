"""An adapter in memory: its configuration, and for each module the matrices of its update, in PEFT's shapes.

A is (rank, in), B is (out, rank), a DoRA magnitude is (out,). Nothing here knows an engine or a file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from finetune.adapters.lora import lora_scale
from finetune.adapters.patterns import matches
from finetune.core.types import FloatArray

PREFIX = "base_model.model."


class LoraUpdate(NamedTuple):
    """One module's update: B A, and for DoRA the magnitude of each row of the weight (Liu et al. 2024)."""

    a: FloatArray  # [rank, in]
    b: FloatArray  # [out, rank]
    magnitude: FloatArray | None = None  # [out]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(array.size for array in self if array is not None)


class UpdateNames(NamedTuple):
    """The keys of one module's update in `adapter_model.safetensors`."""

    a: str
    b: str
    magnitude: str


def peft_names(module: str) -> UpdateNames:
    """PEFT's keys for `module`; plain LoRA has no magnitude."""
    start = f"{PREFIX}{module}."
    return UpdateNames(f"{start}lora_A.weight", f"{start}lora_B.weight", f"{start}lora_magnitude_vector")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` says. The patterns map a module's name, or its end, to its own value."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    base_model: str = ""
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False  # the base stores these weights as (in, out), as GPT-2's Conv1D does

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied by in `module`, whose matrices have this rank."""
        return lora_scale(self.alpha_of(module), rank, use_rslora=self.use_rslora)

    def alpha_of(self, module: str) -> float:
        """The alpha that the configuration gives to `module`."""
        return next((value for key, value in self.alpha_pattern.items() if matches(key, module)), self.alpha)

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives to `module`."""
        return next((value for key, value in self.rank_pattern.items() if matches(key, module)), self.rank)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory: its configuration and its matrices by module path.

    `notices` say what its files leave open and what was taken for it.
    """

    config: AdapterConfig
    updates: Mapping[str, LoraUpdate]
    notices: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of scalars."""
        return sum(update.size for update in self.updates.values())

    def scale(self, module: str) -> float:
        """What B A is multiplied by in `module`."""
        return self.config.scale(module, self.updates[module].rank)

    def renamed(self, names: Mapping[str, str]) -> "Adapter":
        """The same adapter with other names for its modules; names that are not in `names` stay.

        Ranks and alphas stay with their modules: the patterns are written out, as they may not match new names.
        """
        moved = {module: names.get(module, module) for module in self.updates}
        if all(old == new for old, new in moved.items()):
            return self
        config, targets = self.config, self.config.target_modules
        ranks = {new: self.updates[old].rank for old, new in moved.items()}
        alphas = {new: config.alpha_of(old) for old, new in moved.items()}
        renamed = replace(
            config,
            target_modules=targets if isinstance(targets, str) else tuple(moved.get(name, name) for name in targets),
            rank_pattern={module: rank for module, rank in ranks.items() if rank != config.rank},
            alpha_pattern={module: alpha for module, alpha in alphas.items() if alpha != config.alpha},
        )
        return replace(self, config=renamed, updates={moved[old]: update for old, update in self.updates.items()})


def compact_targets(adapted: Iterable[str], available: Iterable[str]) -> tuple[str, ...]:
    """`target_modules` for PEFT: last components where those name exactly the adapted modules, else full paths."""
    chosen = list(adapted)
    last = {module.rsplit(".", 1)[-1] for module in chosen}
    meant = {module for module in available if module.rsplit(".", 1)[-1] in last}
    return tuple(sorted(last)) if meant == set(chosen) else tuple(chosen)


def joined(found: Mapping[str, Mapping[str, FloatArray]], problems: list[str]) -> dict[str, LoraUpdate]:
    """Make an update of each module's arrays (`a`, `b`, `magnitude`), layer by layer.

    What does not fit is added to `problems`.
    """
    updates = {}
    for module in sorted(found, key=_by_layer):
        arrays = found[module]
        missing = {"a", "b"} - arrays.keys()
        if missing:
            problems.append(f"{module}: {' and '.join(f'lora_{name.upper()}' for name in sorted(missing))} is missing")
            continue
        update = _update(arrays)
        if update.a.ndim != 2 or update.b.ndim != 2 or update.rank != update.b.shape[1]:
            problems.append(f"{module}: A {update.a.shape} and B {update.b.shape} do not form an update")
        elif update.magnitude is not None and update.magnitude.shape != update.b.shape[:1]:
            problems.append(f"{module}: magnitude {update.magnitude.shape} does not fit B {update.b.shape}")
        else:
            updates[module] = update
    if not found:
        problems.append("it holds no LoRA tensor")
    return updates


def _by_layer(module: str) -> list[tuple[bool, int, str]]:
    """Layer 10 comes after layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in module.split(".")]


def _update(arrays: Mapping[str, FloatArray]) -> LoraUpdate:
    """A magnitude may also be a row or a column."""
    magnitude = arrays.get("magnitude")
    if magnitude is not None and magnitude.ndim == 2 and 1 in magnitude.shape:
        magnitude = magnitude.reshape(-1)
    return LoraUpdate(arrays["a"], arrays["b"], magnitude)

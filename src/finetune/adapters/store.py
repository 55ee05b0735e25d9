"""Adapters on disk in PEFT's layout, which is ours too; mlx-lm's is read through `mlx_lm.py`.

In memory an adapter is a map from a module's path to its two matrices, in PEFT's shapes: A is (rank, in), B is
(out, rank). Nothing here knows an engine.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import save_file

from finetune.adapters.lora import lora_scale
from finetune.adapters.tensors import read_tensors
from finetune.core.errors import ModelError
from finetune.core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.core.types import FloatArray

_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b"}


class LoraPair(NamedTuple):
    """The two matrices of one module's update, B A."""

    a: FloatArray  # [rank, in]
    b: FloatArray  # [out, rank]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` says. The patterns map a module's name, or its end, to its own value."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    base_model: str = ""
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False  # the base stores these weights as (in, out), as GPT-2's Conv1D does

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied by in `module`, whose matrices have this rank."""
        alpha = next((value for key, value in self.alpha_pattern.items() if _matches(key, module)), self.alpha)
        return lora_scale(alpha, rank, use_rslora=self.use_rslora)

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives to `module`."""
        return next((value for key, value in self.rank_pattern.items() if _matches(key, module)), self.rank)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory: its configuration and its matrices by module path."""

    config: AdapterConfig
    pairs: Mapping[str, LoraPair]

    @property
    def parameters(self) -> int:
        """Number of scalars."""
        return sum(pair.a.size + pair.b.size for pair in self.pairs.values())


def _matches(pattern: str, module: str) -> bool:
    """PEFT's rule: the pattern, a regular expression, matches the end of the module's path."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def peft_names(module: str) -> tuple[str, str]:
    """The keys of A and of B in `adapter_model.safetensors`."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def is_adapter(directory: Path) -> bool:
    """True where the directory holds an adapter of a layout that `read_adapter` reads."""
    return (directory / ADAPTER_CONFIG).is_file()


def compact_targets(adapted: Iterable[str], available: Iterable[str]) -> tuple[str, ...]:
    """`target_modules` for PEFT: last components where those name exactly the adapted modules, else full paths."""
    chosen = list(adapted)
    last = {module.rsplit(".", 1)[-1] for module in chosen}
    meant = {module for module in available if module.rsplit(".", 1)[-1] in last}
    return tuple(sorted(last)) if meant == set(chosen) else tuple(chosen)


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Write PEFT's two files into `directory`, which is made where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, FloatArray] = {}
    for module, pair in adapter.pairs.items():
        tensors.update(zip(peft_names(module), pair, strict=True))
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    document = json.dumps(_peft_document(adapter.config), indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG).write_text(document + "\n", encoding="utf-8")


def _peft_document(config: AdapterConfig) -> dict[str, Any]:
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in config.alpha_pattern.items()},
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": None,
        "bias": "none",
        "inference_mode": True,
    }


def _plain(value: float) -> int | float:
    """PEFT's own files hold whole alphas as integers."""
    return int(value) if float(value).is_integer() else value


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter of PEFT's or mlx-lm's layout, whichever `adapter_config.json` says.

    Raises ModelError for what is missing, damaged, or not plain LoRA, everything at once.
    """
    document = read_document(directory)
    if "peft_type" in document:
        return _read_peft(directory, document)
    if "lora_parameters" in document:
        from finetune.adapters.mlx_lm import read_mlx_lm

        return read_mlx_lm(directory, document)
    raise ModelError(
        f"{directory / ADAPTER_CONFIG} is neither PEFT's (no peft_type) nor mlx-lm's (no lora_parameters). "
        "Give the directory of a LoRA adapter."
    )


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Only the configuration, without the weights (PEFT's layout or mlx-lm's)."""
    document = read_document(directory)
    if "peft_type" in document:
        return _peft_config(directory, document)
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


def _peft_config(directory: Path, document: Mapping[str, Any]) -> AdapterConfig:
    problems = _unsupported(document)
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        problems.append(f"r = {rank!r} is not a rank")
    if not isinstance(alpha, int | float):
        problems.append(f"lora_alpha = {alpha!r} is not a number")
    if problems or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ModelError(f"{directory / ADAPTER_CONFIG} cannot be used: {'; '.join(problems)}.")
    targets = document.get("target_modules") or ()
    return AdapterConfig(
        rank=rank,
        alpha=float(alpha),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        base_model=document.get("base_model_name_or_path") or "",
        dropout=float(document.get("lora_dropout") or 0.0),
        use_rslora=bool(document.get("use_rslora")),
        rank_pattern=document.get("rank_pattern") or {},
        alpha_pattern=document.get("alpha_pattern") or {},
        fan_in_fan_out=bool(document.get("fan_in_fan_out")),
    )


def _unsupported(document: Mapping[str, Any]) -> list[str]:
    problems = []
    if document.get("peft_type") != "LORA":
        problems.append(f"peft_type = {document.get('peft_type')!r}, and only LORA is supported")
    if document.get("use_dora"):
        problems.append("use_dora = true, and DoRA is not supported in this version")
    if document.get("modules_to_save"):
        problems.append(f"modules_to_save = {document['modules_to_save']!r}, and only adapters can be loaded")
    if document.get("bias", "none") != "none":
        problems.append(f"bias = {document['bias']!r}, and trained biases are not supported")
    return problems


def _read_peft(directory: Path, document: Mapping[str, Any]) -> Adapter:
    config = _peft_config(directory, document)
    path = directory / ADAPTER_WEIGHTS
    found: dict[str, dict[str, FloatArray]] = {}
    problems = []
    for name, tensor in read_tensors(path).items():
        suffix = next((known for known in _SUFFIXES if name.endswith(known)), None)
        if suffix is None or not name.startswith(_PREFIX):
            problems.append(f"unexpected tensor {name}")
            continue
        found.setdefault(name[len(_PREFIX) : -len(suffix)], {})[_SUFFIXES[suffix]] = tensor
    pairs = paired(found, problems)
    problems.extend(_rank_problems(config, pairs))
    if problems:
        raise ModelError("\n  ".join([f"{path} cannot be used:", *problems]))
    return Adapter(config, pairs)


def paired(found: Mapping[str, Mapping[str, FloatArray]], problems: list[str]) -> dict[str, LoraPair]:
    """Join the A and B of each module; what does not fit together is added to `problems`."""
    pairs = {}
    for module, matrices in found.items():
        if matrices.keys() != {"a", "b"}:
            problems.append(f"{module}: lora_{'B' if 'a' in matrices else 'A'} is missing")
            continue
        a, b = matrices["a"], matrices["b"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            problems.append(f"{module}: A {a.shape} and B {b.shape} do not form an update")
            continue
        pairs[module] = LoraPair(a, b)
    if not found:
        problems.append("it holds no LoRA tensor")
    return pairs


def _rank_problems(config: AdapterConfig, pairs: Mapping[str, LoraPair]) -> list[str]:
    return [
        f"{module}: rank {pair.a.shape[0]}, and the configuration says {config.rank_of(module)}"
        for module, pair in pairs.items()
        if pair.a.shape[0] != config.rank_of(module)
    ]

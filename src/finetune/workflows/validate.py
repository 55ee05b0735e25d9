"""Check everything that a run needs, count its rows and steps, and give advice, without loading weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.targets import LinearShape, choose_ranks
from finetune.config.advice import advise
from finetune.config.load import LoadedConfig
from finetune.config.schema import RunConfig
from finetune.models.info import ModelInfo, describe_model
from finetune.training.run_directory import check_new
from finetune.workflows.preparation import Preparation, prepare
from finetune.workflows.record import engine_record
from finetune.workflows.starting_adapter import starting_notices


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes for the base, what is trained, its gradient and the optimizer; activations come on top."""

    trainable: int  # parameters
    bytes: int


@dataclass(frozen=True, slots=True)
class Validation:
    """A run that could start: what it would read, do and need. `memory` is None for weights drawn at random."""

    loaded: LoadedConfig
    prepared: Preparation
    memory: MemoryNeed | None
    advice: tuple[str, ...]

    @property
    def notices(self) -> tuple[str, ...]:
        """What was inferred."""
        prepared = self.prepared
        return (*prepared.data.notices, *prepared.plan.notices, *starting_notices(prepared.config))

    def record(self) -> dict[str, Any]:
        """As one JSON object."""
        plan, data, source = self.prepared.plan, self.prepared.data, self.prepared.source
        return {
            "ok": True,
            "model": {"name": source.name, "path": str(source.path), "model_type": source.model_type},
            "engine": engine_record(self.prepared),
            "packing": self.prepared.config.training.packing,
            "template": data.template.name,
            "data": data.report.as_dict(),
            "train_rows": len(data.train),
            "validation_rows": len(data.validation),
            "steps": plan.total_steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "trainable_parameters": self.memory.trainable if self.memory else None,
            "memory_bytes": self.memory.bytes if self.memory else None,
            "config": self.prepared.config.model_dump(mode="json"),
            "sources": {key: str(source) for key, source in self.loaded.sources.items()},
            "notices": list(self.notices),
            "advice": list(self.advice),
        }


def validate_run(loaded: LoadedConfig) -> Validation:
    """Do all that a run does before its weights are loaded. Raises what the run itself would raise."""
    config = loaded.config
    if config.output.output_dir is not None:
        check_new(Path(config.output.output_dir).expanduser())
    prepared = prepare(loaded)
    if config.model.init == "pretrained":
        prepared.engine.module_paths(prepared.source.path)  # refuses files that do not fit their config.json
    return Validation(loaded, prepared, memory_need(prepared), _advice(prepared))


def memory_need(prepared: Preparation) -> MemoryNeed | None:
    """From the headers of the weights. Raises ConfigError for LoRA targets that match nothing."""
    config = prepared.config
    if config.model.init == "random":
        return None
    info = describe_model(prepared.source)
    if config.training.method == "full":
        return MemoryNeed(info.parameters, info.full_memory_bytes)
    trainable = _adapter_parameters(config, info)
    saved = info.saved_by_quantizing(int(config.model.quantization[0])) if config.model.quantization else 0
    return MemoryNeed(trainable, info.memory_bytes_with(trainable) - saved)


def _adapter_parameters(config: RunConfig, info: ModelInfo) -> int:
    if any(".experts." in module.name for module in info.linear_modules):
        # An engine stacks the experts of a mixture under names of its own; these files cannot tell which.
        return info.lora_parameters(config.lora.rank)
    shapes: Mapping[str, LinearShape] = {
        module.name: LinearShape(module.in_features, module.out_features) for module in info.linear_modules
    }
    ranks = choose_ranks(config.lora, shapes)
    adapted = [module for module in info.linear_modules if module.name in ranks]
    magnitudes = sum(module.out_features for module in adapted) if config.training.method == "dora" else 0
    return magnitudes + sum(module.lora_parameters(ranks[module.name]) for module in adapted)


def _advice(prepared: Preparation) -> tuple[str, ...]:
    stored = prepared.config.model.init == "pretrained"
    return advise(
        prepared.config,
        lengths=prepared.data.train_lengths.tolist(),
        validation_rows=len(prepared.data.validation),
        total_steps=prepared.plan.total_steps,
        parameters=describe_model(prepared.source).parameters if stored else None,
    )

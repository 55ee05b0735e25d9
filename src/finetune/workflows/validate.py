"""Check everything that a run needs, count its rows and steps, and give advice, without loading weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.targets import LinearShape, choose_ranks
from finetune.config.load import LoadedConfig
from finetune.config.schema import RunConfig
from finetune.models.architecture import read_architecture
from finetune.models.info import ModelInfo, describe_model
from finetune.planning.memory import MemoryPlan
from finetune.planning.runs import count_adapters
from finetune.training.run_directory import check_new
from finetune.workflows.auto_batch import settle_batch
from finetune.workflows.memory import memory_plan, memory_record, memory_sentence, memory_warning
from finetune.workflows.preparation import Preparation, prepare
from finetune.workflows.record import engine_record
from finetune.workflows.starting_adapter import starting_notices


@dataclass(frozen=True, slots=True)
class Validation:
    """A run that could start: what it would read, do and need."""

    loaded: LoadedConfig
    prepared: Preparation
    trainable: int | None  # parameters; None where neither files nor config.json tell
    memory: MemoryPlan | None  # None for an architecture whose sizes are not known
    settled: tuple[str, ...]  # what `batch_size: auto` came to
    advice: tuple[str, ...]

    @property
    def notices(self) -> tuple[str, ...]:
        """What was inferred."""
        prepared = self.prepared
        return (*self.settled, *prepared.data.notices, *prepared.plan.notices, *starting_notices(prepared.config))

    @property
    def memory_sentence(self) -> str:
        """The predicted peak with its parts."""
        return memory_sentence(self.memory, self.prepared)

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
            "trainable_parameters": self.trainable,
            "memory": memory_record(self.memory, self.prepared),
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
    settled: list[str] = []
    prepared = settle_batch(prepare(loaded), tries=False, say=settled.append)
    if config.model.init == "pretrained":
        prepared.engine.module_paths(prepared.source.path)  # refuses files that do not fit their config.json
    trainable, memory = trainable_parameters(prepared), memory_plan(prepared)
    warning = memory_warning(memory, prepared)
    advice = (*_advice(prepared), *([warning] if warning else []))
    return Validation(loaded, prepared, trainable, memory, tuple(settled), advice)


def trainable_parameters(prepared: Preparation) -> int | None:
    """From the headers of the weights, or from config.json. Raises ConfigError for LoRA targets that match nothing."""
    config = prepared.config
    if config.model.init == "pretrained":
        info = describe_model(prepared.source)
        return info.parameters if config.training.method == "full" else _adapter_parameters(config, info)
    architecture = read_architecture(prepared.source.config)
    if architecture is None:
        return None
    if config.training.method == "full":
        return architecture.parameters
    return count_adapters(architecture, config.lora, use_dora=config.training.method == "dora").parameters


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
    return prepared.advice(describe_model(prepared.source).parameters if stored else None)

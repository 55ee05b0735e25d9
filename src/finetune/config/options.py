"""Every option of the schema as one flat table: what loading, help, documentation and suggestions look up."""

import difflib
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from finetune.config.schema import RunConfig, Section


@dataclass(frozen=True, slots=True)
class Option:
    """One key of a configuration file, `section.name`."""

    section: str
    name: str
    field: FieldInfo

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"FT_{self.section.upper()}__{self.name.upper()}"

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """The value where nobody gives one; None for a required option."""
        return None if self.required else self.field.get_default(call_default_factory=True)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it accepts, where it accepts only words."""
        return _choices(self.field.annotation)

    @property
    def accepts_text(self) -> bool:
        """Whether free text is a value."""
        return str in _members(self.field.annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of any other type, itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _choices(annotation: Any) -> tuple[str, ...]:
    members = [member for member in _members(annotation) if member is not type(None)]
    if len(members) == 1 and typing.get_origin(members[0]) is Literal:
        return typing.get_args(members[0])
    return ()


@functools.cache
def sections() -> Mapping[str, type[Section]]:
    """Section name to its model, in the order of the schema."""
    found = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {name: model for name, model in found.items() if isinstance(model, type) and issubclass(model, Section)}


@functools.cache
def options() -> Mapping[str, Option]:
    """Key (`training.learning_rate`) to option, in the order of the schema."""
    every = (
        Option(section, name, field)
        for section, model in sections().items()
        for name, field in model.model_fields.items()
    )
    return {option.key: option for option in every}


def describe(key: str) -> str:
    """The help text of an option, as the command line shows it."""
    return options()[key].description


# What other tools call the same thing. Keys that exist here under another section are found without this table.
OTHER_NAMES: Mapping[str, str] = {
    "base_model": "model.name",
    "model_name": "model.name",
    "model_id": "model.name",
    "model_name_or_path": "model.name",
    "engine": "model.backend",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "device_map": "model.device",
    "bits": "model.quantization",
    "quant_bits": "model.quantization",
    "quantize": "model.quantization",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "target_layers": "lora.target_modules",
    "lr": "training.learning_rate",
    "num_epochs": "training.epochs",
    "n_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_epochs": "training.epochs",
    "iters": "training.max_steps",
    "num_steps": "training.max_steps",
    "total_steps": "training.max_steps",
    "per_device_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "grad_accum_steps": "training.gradient_accumulation_steps",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "lr_schedule": "training.schedule",
    "min_lr": "training.min_learning_rate",
    "optim": "training.optimizer",
    "adam_beta1": "training.beta1",
    "adam_beta2": "training.beta2",
    "adam_epsilon": "training.epsilon",
    "grad_clip": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "grad_checkpoint": "training.gradient_checkpointing",
    "early_stopping": "training.early_stopping_patience",
    "patience": "training.early_stopping_patience",
    "fine_tune_type": "training.method",
    "finetuning_type": "training.method",
    "use_dora": "training.method",
    "pack": "training.packing",
    "sample_packing": "training.packing",
    "sequence_packing": "training.packing",
    "padding_free": "training.packing",
    "dataset": "data.train_file",
    "dataset_path": "data.train_file",
    "train_data": "data.train_file",
    "train_path": "data.train_file",
    "val_file": "data.validation_file",
    "eval_file": "data.validation_file",
    "valid_file": "data.validation_file",
    "val_split": "data.validation_split",
    "val_set_size": "data.validation_split",
    "train_split": "data.validation_split",
    "chat_template": "data.template",
    "prompt_template": "data.template",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "context_length": "data.max_length",
    "train_on_inputs": "data.train_on_prompt",
    "checkpoint_dir": "output.output_dir",
    "final_model_dir": "output.output_dir",
    "adapter_path": "output.output_dir",
    "save_steps": "output.checkpoint_steps",
    "save_every": "output.checkpoint_steps",
    "steps_per_eval": "output.eval_steps",
    "save_total_limit": "output.keep_checkpoints",
    "keep_last_n_checkpoints": "output.keep_checkpoints",
}


def suggest(section: str | None, name: str) -> str | None:
    """The key that somebody most likely meant by `section.name`; None where nothing is close.

    In this order: the same name in another section, another tool's name, a near name in this section, a near
    name in any section.
    """
    plain = name.lower().replace("-", "_")
    elsewhere = [option.key for option in options().values() if option.name == plain]
    if elsewhere:
        return elsewhere[0]
    if plain in OTHER_NAMES:
        return OTHER_NAMES[plain]
    own = {option.name: option.key for option in options().values() if option.section == section}
    every = {option.name: option.key for option in options().values()}
    for names, cutoff in ((own, 0.6), (every, 0.75)):
        near = difflib.get_close_matches(plain, names, n=1, cutoff=cutoff)
        if near:
            return names[near[0]]
    return None


def suggest_section(name: str) -> str | None:
    """The nearest section name."""
    near = difflib.get_close_matches(name.lower(), sections(), n=1, cutoff=0.6)
    return near[0] if near else None

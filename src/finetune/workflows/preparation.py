"""Everything that a run needs before anything is written: the model, the data, the plan, and what identifies them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.advice import LengthFacts, advise
from finetune.config.load import LoadedConfig, plain
from finetune.config.schema import DataConfig, DataFile, RunConfig
from finetune.core.errors import ConfigError, ModelError
from finetune.core.files import sha256_of
from finetune.core.types import Dtype
from finetune.data.batching import BatchPlan
from finetune.data.load import training_files
from finetune.data.prepare import PreparedData, prepare_data
from finetune.data.readers import data_files
from finetune.data.selection import check_max_length
from finetune.data.stored_rows import StoredRows, spread
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.base import Engine
from finetune.engines.registry import EngineChoice, choose, choose_engine, needed_features, require
from finetune.hub import cache
from finetune.models.info import stored_bits, stored_dtype
from finetune.models.source import DEMO, ModelSource, is_hub_model, resolve_model
from finetune.training.plan import DEFAULT_EPOCHS, TrainingPlan, make_plan
from finetune.workflows.starting_adapter import settled

CONTENT_OF_A_MODEL = ("config.json", "*.safetensors")
SHORTEST_MAX_LENGTH = 16  # the schema's least


@dataclass(frozen=True, slots=True)
class Preparation:
    """A run that could start now. `config` has every inferred value written out."""

    config: RunConfig
    choice: EngineChoice
    engine: Engine
    dtype: Dtype  # of the base's weights and of the products
    source: ModelSource
    tokenizer: TextTokenizer
    data: PreparedData
    batches: BatchPlan
    plan: TrainingPlan

    @property
    def device(self) -> str:
        """Where it is computed, for people."""
        wanted = self.config.model.device
        return self.engine.info().device if wanted == "auto" else wanted

    @property
    def evaluated(self) -> StoredRows:
        """The validation rows that an evaluation reads."""
        return spread(self.data.validation, self.config.output.eval_rows)

    @property
    def on_cpu(self) -> bool:
        """Whether arrays are in the process's own memory."""
        return self.device.startswith("cpu")

    def advice(self, parameters: int | None) -> tuple[str, ...]:
        """What is unusual about the configuration for this data; `parameters` are those of the model."""
        report = self.data.report
        lengths = report.lengths
        return advise(
            self.config,
            rows=len(self.data.train),
            lengths=None if lengths is None else LengthFacts(lengths.rows, lengths.longest, report.longer),
            validation_rows=len(self.data.validation),
            evaluated_rows=len(self.evaluated) * self.plan.evaluations,
            total_steps=self.plan.total_steps,
            parameters=parameters,
        )

    def engine_notice(self) -> str:
        """What runs this, why, where, in which type and with which layout of rows."""
        rows = "end to end" if self.config.training.packing else "side by side"
        return f"Engine: {self.choice} on {self.device} in {self.dtype}; rows lie {rows}."

    def model_files(self) -> dict[str, str]:
        """SHA-256 of the files that the weights come from; drawing them at random needs config.json alone."""
        patterns = CONTENT_OF_A_MODEL if self.config.model.init == "pretrained" else CONTENT_OF_A_MODEL[:1]
        files = sorted(path for pattern in patterns for path in self.source.path.glob(pattern))
        return {path.name: sha256_of(path) for path in files}


def prepare(given: RunConfig | LoadedConfig) -> Preparation:
    """Choose the engine, read model description, tokenizer and data, and work out the plan. Writes nothing.

    Options that the engine, the model's files or the machine rule out are refused first; weights are not loaded yet.
    """
    config = settled(given)
    choice = choose(config.model)
    require(choice.name, needed_features(config))
    source = resolve_model(config.model.name, revision=config.model.revision, weights=config.model.init == "pretrained")
    _check_files(given, source)
    tokenizer = TextTokenizer.open(source.path)
    _require_data(config.data)
    engine = choose_engine(config.model)  # imports its library, which takes seconds: what is missing was said before
    data = prepare_data(
        config.data,
        tokenizer=tokenizer,
        context_length=source.context_length,
        seed=config.training.seed,
        samples=config.output.sample_prompts,
    )
    _check_tokens(source, tokenizer, data)
    config = with_engine(config, engine)
    batches = batch_plan(config, data, pad_id=tokenizer.pad_id)
    plan = make_plan(config.training, config.output, steps_per_epoch=batches.steps_per_epoch)
    dtype = engine.compute_dtype(config.model, _stored(config, source))
    return Preparation(
        resolved(config, data, plan, source), choice, engine, dtype, source, tokenizer, data, batches, plan
    )


def _check_files(given: RunConfig | LoadedConfig, source: ModelSource) -> None:
    """Refuse what the model's config.json rules out, before any row is read."""
    config = plain(given)
    place = str(given.sources["data.max_length"]) if isinstance(given, LoadedConfig) else ""
    check_max_length(config.data.max_length, source.context_length, given_in=place)
    bits = stored_bits(source.config)
    if bits is not None and config.training.method == "full":
        problem = (
            f"training.method=full changes every weight, and those of {source.name} are quantised ({bits}), so they "
            "cannot be changed. Set training.method to lora, which is QLoRA here, or choose the model that they "
            "were made from."
        )
        raise ConfigError("The configuration", [problem])


def _require_data(data: DataConfig) -> None:
    """Raise DataError for files that are not there."""
    validation = () if data.validation_file is None else (data.validation_file,)
    for path in (*(entry.path for entry in training_files(data.train_file)), *validation):
        data_files(Path(path).expanduser())


def _check_tokens(source: ModelSource, tokenizer: TextTokenizer, data: PreparedData) -> None:
    """Refuse rows with tokens that the model has no embedding for; a tokenizer may know more than the rows use."""
    if tokenizer.largest_id < source.vocab_size:
        return
    rows = (row.input_ids for part in (data.train, data.validation) for row in part)
    largest = max((int(ids.max()) for ids in rows if len(ids)), default=0)
    if largest >= source.vocab_size:
        raise ModelError(
            f"{source.path}: its tokenizer makes token {largest} ({tokenizer.token_text(largest)!r}) of these rows, "
            f"and the model knows 0 to {source.vocab_size - 1} (vocab_size of config.json). Copy the model again, with "
            "the tokenizer that belongs to it."
        )


def _stored(config: RunConfig, source: ModelSource) -> Dtype:
    return stored_dtype(source.path) if config.model.init == "pretrained" else "float32"


def with_engine(config: RunConfig, engine: Engine) -> RunConfig:
    """The configuration with the engine that was chosen, and with what suits it where nothing was asked for."""
    packing = engine.packs_rows if config.training.packing is None else config.training.packing
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"backend": engine.name}),
            "training": config.training.model_copy(update={"packing": packing}),
        }
    )


def batch_plan(config: RunConfig, data: PreparedData, *, pad_id: int) -> BatchPlan:
    """The rows of each step, and how they are cut into micro-batches; `training.packing` is decided by now."""
    training = config.training
    return BatchPlan(
        data.train,
        rows_per_step=training.rows_per_step,
        max_rows=training.most_rows,
        max_tokens=training.max_batch_tokens,
        seed=training.seed,
        pad_id=pad_id,
        packing=bool(training.packing),
    )


def resolved(config: RunConfig, data: PreparedData, plan: TrainingPlan, source: ModelSource) -> RunConfig:
    """The configuration with inferred values, absolute paths and the commit of a cached model: it repeats the run
    from any directory.

    It names no output directory, so that it can be run again as it is.
    """
    training: dict[str, Any] = {"warmup_steps": plan.warmup_steps}
    if config.training.epochs is None and config.training.max_steps is None:
        training["epochs"] = DEFAULT_EPOCHS
    output = {"output_dir": None, "eval_steps": plan.eval_steps, "checkpoint_steps": plan.checkpoint_steps}
    name = config.model.name
    model: dict[str, Any] = {"name": _absolute(name) if _is_path(name) else name}
    if is_hub_model(name):
        model["revision"] = cache.commit_of(source.path)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "lora": config.lora.model_copy(update=_resolved_lora(config)),
            "training": config.training.model_copy(update=training),
            "data": config.data.model_copy(update=_resolved_data(config, data)),
            "output": config.output.model_copy(update=output),
        }
    )


def _resolved_lora(config: RunConfig) -> Mapping[str, Any]:
    start = config.lora.init_from
    return {"alpha": config.lora.effective_alpha, "init_from": None if start is None else _absolute(start)}


def _resolved_data(config: RunConfig, data: PreparedData) -> Mapping[str, Any]:
    given = config.data
    template = given.template or data.template.name
    values: dict[str, Any] = {
        "train_file": _absolute_files(given),
        "validation_file": None if given.validation_file is None else _absolute(given.validation_file),
        "template": _absolute(template) if Path(template).suffix in {".jinja", ".jinja2", ".j2"} else template,
    }
    # Only inference gives a length that the schema refuses: below its least, or above what a micro-batch holds.
    if SHORTEST_MAX_LENGTH <= data.max_length <= (config.training.max_batch_tokens or data.max_length):
        values["max_length"] = data.max_length
    return values


def _absolute_files(given: DataConfig) -> str | tuple[str | DataFile, ...]:
    if isinstance(given.train_file, str):
        return _absolute(given.train_file)
    return tuple(
        _absolute(file) if isinstance(file, str) else file.model_copy(update={"path": _absolute(file.path)})
        for file in given.train_file
    )


def _is_path(model: str) -> bool:
    return model != DEMO and Path(model).expanduser().is_dir()


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())

"""The configuration: one frozen model a section, each option once, with its range and its help text.

The descriptions feed the JSON schema, the command line's help and the documentation. Loading from files,
environment and command line is in `load.py`; advice about unusual values is in `advice.py`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
DEFAULT_ROWS = 4


class Section(BaseModel):
    """Values never change after loading, and a key that is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The base model and the engine that runs it."""

    name: str = Field(description="A local directory, the name of a model on the hub, or `demo`")
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub; default: main")
    backend: Literal["auto", "mlx", "pytorch"] = Field("auto", description="The engine")
    device: Literal["auto", "cpu", "cuda", "metal"] = Field(
        "auto", description="Where the engine computes; auto: the fastest that this machine has"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="Quantise the frozen base (QLoRA)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and products; auto: the files' where the device is fast in it, else float32",
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="`random` draws new weights from the seed: pre-training from config.json alone"
    )


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021): W' = W + (alpha / rank) B A."""

    rank: Positive = Field(16, description="Rank of the update")
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="Scale numerator; default 2 x rank")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Names or suffixes of linear modules, or `all-linear` (all but the head)"
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Another rank for modules whose name ends in the key"
    )
    init_from: str | None = Field(
        None, description="Adapter to start from (PEFT's or mlx-lm's files): rank, alpha, targets, method are its own"
    )

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or its default of 2 x rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class TrainingConfig(Section):
    """The optimisation. Rows per step = batch_size x gradient_accumulation_steps."""

    method: Literal["lora", "dora", "full"] = Field(
        "lora", description="Tune adapters, adapters with magnitudes (Liu et al. 2024), or every weight"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(2e-4, description="Peak learning rate")
    batch_size: Positive | Literal["auto"] = Field(
        DEFAULT_ROWS,
        description="Rows in memory at once, at most; auto: steps of 4 rows x gradient_accumulation_steps, cut as the "
        "memory there is allows, with gradient_checkpointing where that is needed",
    )
    gradient_accumulation_steps: Positive = Field(1, description="Micro-batches of `batch_size` rows a step")
    max_batch_tokens: Positive | None = Field(
        None, description="Most tokens of a micro-batch, padding included; default: no limit beyond batch_size"
    )
    packing: bool | None = Field(
        None, description="Lay rows end to end instead of padding them; default: what suits the engine"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the data; default 3 where max_steps is not set either"
    )
    max_steps: Positive | None = Field(
        None, description="Optimizer steps; with epochs too, the first limit ends the run"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up; default 5 % of the steps, at most 100"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Learning rate after the warm-up")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(0.0, description="Floor of the schedule")
    optimizer: Literal["adamw", "adam", "sgd", "adafactor"] = Field("adamw", description="Update rule")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Decoupled for adamw and adafactor, added to the gradient for adam and sgd"
    )
    beta1: Share = Field(0.9, description="Decay of the first moment; momentum for sgd")
    beta2: Share = Field(0.999, description="Decay of the second moment")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the denominator of Adam")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="Clip by global norm; null: never")
    label_smoothing: Share = Field(0.0, description="Share of the target's probability spread over the vocabulary")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more work")
    early_stopping_patience: Positive | None = Field(
        None, description="Stop after this many evaluations without a better loss"
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] = Field(
        0.0, description="A loss is better when it is lower by more than this"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of everything that is drawn")

    @property
    def most_rows(self) -> int:
        """`batch_size` as a number: its default where it is auto."""
        return DEFAULT_ROWS if self.batch_size == "auto" else self.batch_size

    @property
    def rows_per_step(self) -> int:
        """Rows that an update is computed from."""
        return self.most_rows * self.gradient_accumulation_steps


class DataFile(Section):
    """One of several training files. `weight` 2 reads its rows twice an epoch, 0.5 half of them."""

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0


class DataConfig(Section):
    """The examples: where they are, how they are rendered, what is trained on."""

    train_file: str | tuple[str | DataFile, ...] = Field(
        description="File, directory, hf://datasets/owner/name[@revision][/path], or a list of them with weights"
    )
    validation_file: str | None = Field(None, description="Rows to evaluate on; default: a part of the training file")
    validation_split: Share = Field(0.1, description="Share of the rows kept for validation where no file is given")
    template: str | None = Field(
        None, description="Name of a template or a .jinja file; default: the tokenizer's own, else alpaca or chatml"
    )
    max_length: Annotated[int, Field(ge=16)] | None = Field(
        None, description="Most tokens of a row; default: the model's context, or the longest row if shorter"
    )
    on_long: Literal["truncate", "drop", "error"] = Field("truncate", description="What happens to a longer row")
    train_on_prompt: bool = Field(False, description="Train on prompts too (plain text is always trained in full)")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Map from a known field (prompt, completion, text, ...) to the file's column"
    )
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="More bad rows than this fail")
    include_undesirable: bool = Field(False, description="Train on rows labelled undesirable as well")


class OutputConfig(Section):
    """What a run leaves on disk, and how often."""

    output_dir: str | None = Field(
        None, description="The run's directory, new or empty; default: `outputs/<model>-<data>-<time>`"
    )
    checkpoint_steps: Positive | None = Field(None, description="Steps between checkpoints; default: as eval_steps")
    eval_steps: Positive | None = Field(None, description="Steps between evaluations; default: a tenth of the run")
    eval_rows: Positive | None = Field(
        None, description="Most validation rows of an evaluation, at even distances; default: all"
    )
    keep_checkpoints: Positive = Field(3, description="Latest checkpoints to keep, besides the best")
    sample_prompts: Annotated[int, Field(ge=0)] = Field(3, description="Validation prompts answered at each evaluation")
    sample_tokens: Positive = Field(64, description="Most tokens of such an answer")


class RunConfig(Section):
    """The whole configuration of one run; the file's top-level keys are its sections."""

    model: ModelConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    data: DataConfig
    output: OutputConfig = Field(default_factory=OutputConfig)

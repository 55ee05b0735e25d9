"""What the memory of a run depends on, read off its configuration."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from finetune.adapters.targets import LinearShape, choose_ranks
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Dtype
from finetune.engines.base import Engine
from finetune.models.architecture import Architecture
from finetune.planning.planned import EngineName, PlannedRun

_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 0}  # of each trained value; adafactor's are few


class AdapterCount(NamedTuple):
    """What adapters add to a model."""

    parameters: int
    ranks: int  # of one layer's modules, added up


def planned_run(
    architecture: Architecture,
    *,
    model: ModelConfig,
    training: TrainingConfig,
    lora: LoraConfig,
    engine: Engine,
    dtype: Dtype,
    lengths: Sequence[int],
    trained_share: float,
) -> PlannedRun:
    """The largest micro-batch that rows of these lengths (in tokens) can make, and what stands around it.

    `trained_share` is the share of tokens that are trained on. Raises ConfigError for targets that match nothing.
    """
    longest = max(lengths) - 1  # the last token of a row is a target only
    none = AdapterCount(0, 0)
    adapters = (
        none if training.method == "full" else count_adapters(architecture, lora, use_dora=training.method == "dora")
    )
    rows = sorted((length - 1 for length in lengths), reverse=True)[: training.batch_size]
    tokens = min(sum(rows), max(training.max_batch_tokens or sum(rows), longest))
    return PlannedRun(
        engine=cast(EngineName, engine.name),
        method=training.method,
        value_bytes=_BYTES[dtype],
        bits=None if model.quantization is None else int(model.quantization[0]),
        adapter_parameters=adapters.parameters,
        ranks=adapters.ranks,
        moments=_MOMENTS[training.optimizer],
        tokens=tokens,
        longest=longest,
        trained=max(1, int(tokens * trained_share)),
        recompute=training.gradient_checkpointing,
        graphs=engine.graphs(model, training),
    )


def count_adapters(architecture: Architecture, lora: LoraConfig, *, use_dora: bool) -> AdapterCount:
    """Raises ConfigError for targets that match nothing."""
    shapes = {name: LinearShape(linear.in_features, linear.out_features) for name, linear in architecture.modules()}
    ranks = choose_ranks(lora, shapes)
    parameters = sum(
        rank * (shapes[name].in_features + shapes[name].out_features) + use_dora * shapes[name].out_features
        for name, rank in ranks.items()
    )
    return AdapterCount(parameters, sum(ranks.values()) // architecture.layers)

"""What the memory of a run depends on, read off its configuration."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from finetune.adapters.targets import LinearShape, choose_ranks
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Dtype
from finetune.engines.registry import EngineName
from finetune.models.architecture import Architecture
from finetune.planning.planned import EVERYWHERE, PlannedRun, Reads
from finetune.planning.steps import BatchSize

VALUE_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 0}  # of each trained value; adafactor's are few


class AdapterCount(NamedTuple):
    """What adapters add to a model."""

    parameters: int
    ranks: int  # of one layer's modules, added up
    reads: Reads


class Surroundings(NamedTuple):
    """Where a run is computed."""

    dtype: Dtype
    on_cpu: bool
    spares: bool = False  # whether `Engine.spare_memory` is asked for
    resident: int = 0  # bytes that the process holds before the model is loaded; 0: not known


def graphs_of(architecture: Architecture, most: int) -> int:
    """Parts of a step that are computed side by side: `most`, where a model can be told where documents end."""
    return 1 if architecture.soft_capped else most


def planned_run(
    architecture: Architecture,
    batch: BatchSize,
    where: Surroundings,
    *,
    model: ModelConfig,
    training: TrainingConfig,
    lora: LoraConfig,
    engine: EngineName,
    graphs: int = 1,
) -> PlannedRun:
    """Raises ConfigError for targets that match nothing."""
    none = AdapterCount(0, 0, EVERYWHERE)
    dora = training.method == "dora"
    adapters = none if training.method == "full" else count_adapters(architecture, lora, use_dora=dora)
    apart = engine == "mlx" and (architecture.soft_capped or not where.on_cpu)  # rows side by side, padded
    return PlannedRun(
        engine=engine,
        method=training.method,
        value_bytes=VALUE_BYTES[where.dtype],
        bits=architecture.stored_bits or (None if model.quantization is None else int(model.quantization[0])),
        adapter_parameters=adapters.parameters,
        ranks=adapters.ranks,
        reads=adapters.reads,
        moments=_MOMENTS[training.optimizer],
        tokens=batch.padded if apart else batch.tokens,
        longest=batch.longest,
        trained=batch.trained,
        recompute=training.gradient_checkpointing,
        calls=batch.calls,
        sizes=batch.sizes,
        graphs=graphs,
        on_cpu=where.on_cpu,
        returns_memory=where.spares or training.gradient_checkpointing or model.quantization is not None,
        resident=where.resident,
    )


def count_adapters(architecture: Architecture, lora: LoraConfig, *, use_dora: bool) -> AdapterCount:
    """Raises ConfigError for targets that match nothing."""
    shapes = {name: LinearShape(linear.in_features, linear.out_features) for name, linear in architecture.modules()}
    ranks = choose_ranks(lora, shapes)
    parameters = sum(
        rank * (shapes[name].in_features + shapes[name].out_features) + use_dora * shapes[name].out_features
        for name, rank in ranks.items()
    )
    return AdapterCount(parameters, sum(ranks.values()) // architecture.layers, _reads(ranks))


def _reads(modules: Iterable[str]) -> Reads:
    """Where the named modules read."""
    names = {module.rpartition(".")[2] for module in modules}
    last = {"mlp.c_proj", "attn.c_proj"} & {".".join(module.split(".")[-2:]) for module in modules}
    return Reads(
        attention=int(bool(names & {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"})),
        result=int("o_proj" in names or "attn.c_proj" in last),
        feed_forward=int(bool(names & {"gate_proj", "up_proj", "gate_up_proj", "c_fc"})),
        product=int("down_proj" in names or "mlp.c_proj" in last),
    )

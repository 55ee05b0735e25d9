"""What memory a prepared run needs at its peak, beside what this machine has left."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.core.machine import resident_memory
from finetune.models.architecture import Architecture, read_architecture
from finetune.planning.memory import MemoryPlan, plan_memory
from finetune.planning.runs import Surroundings, graphs_of, planned_run
from finetune.planning.steps import BatchSize, heavy_steps, largest_batch
from finetune.workflows.preparation import Preparation

PARTS: Mapping[str, str] = {
    "weights": "weights",
    "trained": "what is trained",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "update": "update",
    "holes": "freed but held",
    "libraries": "libraries",
}
_EASY = 0.8  # of free memory, up to which speed comes first
CURE = (
    "Lower training.batch_size (and raise training.gradient_accumulation_steps to keep the rows of a step), set "
    "training.gradient_checkpointing: true, lower data.max_length, or set model.quantization: 4bit."
)


def memory_plan(prepared: Preparation, heavy: Sequence[int] | None = None) -> MemoryPlan | None:
    """The prediction; None for an architecture whose sizes config.json does not give in a known way.

    Where it would come close to what is free, it is that of a run that spares memory (`Engine.spare_memory`).
    `heavy` are the run's `heavy_steps`, where they are known. Raises ConfigError for LoRA targets that match nothing.
    """
    architecture = read_architecture(prepared.source.config)
    if architecture is None:
        return None
    if heavy is None:
        heavy = heavy_steps_of(prepared, max_rows=prepared.config.training.most_rows)
    graphs = graphs_of(architecture, prepared.engine.graphs(prepared.config.model, prepared.config.training))
    batch = largest_batch([prepared.batches.step(index) for index in heavy], graphs=graphs)
    plan = _plan(prepared, architecture, batch, graphs, spares=False)
    if needed_memory(plan, prepared) <= _EASY * prepared.engine.free_memory(prepared.config.model):
        return plan
    return _plan(prepared, architecture, batch, graphs, spares=True)


def needed_memory(plan: MemoryPlan, prepared: Preparation) -> int:
    """Bytes that must be free where the run is computed."""
    return plan.growth if prepared.on_cpu else plan.arrays


def _plan(
    prepared: Preparation, architecture: Architecture, batch: BatchSize, graphs: int, *, spares: bool
) -> MemoryPlan:
    config = prepared.config
    run = planned_run(
        architecture,
        batch,
        Surroundings(prepared.dtype, prepared.on_cpu, spares=spares, resident=resident_memory()),
        model=config.model,
        training=config.training,
        lora=config.lora,
        engine=prepared.choice.name,
        graphs=graphs,
    )
    return plan_memory(architecture, run)


def heavy_steps_of(prepared: Preparation, *, max_rows: int) -> Sequence[int]:
    """The steps of the run that may need most, by their `max_rows` longest rows."""
    lengths = prepared.data.train_lengths
    return heavy_steps(prepared.batches, lengths, count=prepared.plan.total_steps, max_rows=max_rows)


def memory_sentence(plan: MemoryPlan | None, prepared: Preparation) -> str:
    """The prediction and its parts, for people."""
    if plan is None:
        kind = prepared.source.model_type
        return f"Memory: no prediction, because the sizes of a {kind} model are not worked out from its config.json."
    sizes = {name: getattr(plan, key) for key, name in PARTS.items()}
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in sizes.items() if size)
    return f"Memory: about {_gb(plan.total)} at the peak ({listed})."


def memory_warning(plan: MemoryPlan | None, prepared: Preparation) -> str | None:
    """What to do where the prediction is more than there is."""
    if plan is None:
        return None
    needed, free = needed_memory(plan, prepared), prepared.engine.free_memory(prepared.config.model)
    if needed <= free:
        return None
    return f"This run needs about {_gb(needed)} more memory at its peak, and {_gb(free)} are free. {CURE}"


def memory_record(plan: MemoryPlan | None, prepared: Preparation, observed: int | None = None) -> dict[str, Any]:
    """For `ft train validate --json` and report.json, where what was observed stands beside it.

    `counts` says what the observed figure is of: MLX and CUDA count arrays, PyTorch on a CPU is the whole process.
    """
    process = prepared.on_cpu and prepared.engine.name == "pytorch"
    record: dict[str, Any] = {"counts": "process" if process else "arrays", "observed_bytes": observed}
    if plan is None:
        return {"predicted_bytes": None, "parts": None, **record}
    predicted = plan.total if process else plan.arrays
    return {"predicted_bytes": predicted, "parts": {key: getattr(plan, key) for key in PARTS}, **record}


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"

"""What memory a prepared run needs at its peak, beside what this machine has left."""

from collections.abc import Mapping
from typing import Any

from finetune.core.machine import resident_memory
from finetune.models.architecture import read_architecture
from finetune.planning.memory import MemoryPlan, plan_memory
from finetune.planning.runs import Surroundings, planned_run
from finetune.planning.steps import BatchSize, heaviest_step, largest_batch
from finetune.workflows.preparation import Preparation

PARTS: Mapping[str, str] = {
    "weights": "weights",
    "trained": "what is trained",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "holes": "freed but held",
    "libraries": "libraries",
}
CURE = (
    "Lower training.batch_size (and raise training.gradient_accumulation_steps to keep the rows of a step), set "
    "training.gradient_checkpointing: true, lower data.max_length, or set model.quantization: 4bit."
)


def memory_plan(prepared: Preparation) -> MemoryPlan | None:
    """The prediction; None for an architecture whose sizes config.json does not give in a known way.

    Raises ConfigError for LoRA targets that match nothing.
    """
    architecture = read_architecture(prepared.source.config)
    if architecture is None:
        return None
    config = prepared.config
    where = Surroundings(prepared.dtype, prepared.on_cpu, resident=resident_memory())
    run = planned_run(
        architecture,
        largest_of(prepared),
        where,
        model=config.model,
        training=config.training,
        lora=config.lora,
        engine=prepared.choice.name,
        graphs=prepared.engine.graphs(config.model, config.training),
    )
    return plan_memory(architecture, run)


def largest_of(prepared: Preparation) -> BatchSize:
    """The micro-batch of the run that needs most."""
    training = prepared.config.training
    index = heaviest_step(
        prepared.batches,
        prepared.data.train_lengths - 1,
        count=prepared.plan.total_steps,
        max_rows=training.batch_size,
        max_tokens=training.max_batch_tokens,
    )
    return largest_batch(prepared.batches.step(index))


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
    needed, free = plan.arrays + plan.holes, prepared.engine.free_memory(prepared.config.model)
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

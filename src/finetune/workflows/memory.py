"""What memory a prepared run needs at its peak, beside what this machine has left."""

from collections.abc import Mapping
from typing import Any

from finetune.core.machine import free_memory
from finetune.models.architecture import read_architecture
from finetune.planning.memory import MemoryPlan, plan_memory
from finetune.planning.runs import planned_run
from finetune.workflows.preparation import Preparation

PARTS: Mapping[str, str] = {
    "weights": "weights",
    "trained": "what is trained",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "libraries": "libraries",
}


def memory_plan(prepared: Preparation) -> MemoryPlan | None:
    """The prediction; None for an architecture whose sizes config.json does not give in a known way."""
    architecture = read_architecture(prepared.source.config)
    if architecture is None:
        return None
    config, data = prepared.config, prepared.data
    run = planned_run(
        architecture,
        model=config.model,
        training=config.training,
        lora=config.lora,
        engine=prepared.engine,
        dtype=prepared.dtype,
        lengths=[len(row) for row in data.train],
        trained_share=data.fingerprints["trained_tokens"] / data.fingerprints["tokens"],
    )
    return plan_memory(architecture, run)


def comparable(plan: MemoryPlan, prepared: Preparation) -> int:
    """The part of the prediction that the engine's own figure counts: arrays, or on PyTorch's CPU the process."""
    counts_process = prepared.engine.name == "pytorch" and prepared.device.startswith("cpu")
    return plan.total if counts_process else plan.arrays


def memory_sentence(plan: MemoryPlan) -> str:
    """The prediction and its parts, for people."""
    parts = ", ".join(f"{name} {_gb(getattr(plan, key))}" for key, name in PARTS.items())
    return f"Memory: about {_gb(plan.total)} at the peak ({parts})."


def memory_warning(plan: MemoryPlan) -> str | None:
    """What to do where the prediction is more than there is."""
    free = free_memory()
    if plan.total <= free:
        return None
    return (
        f"This run needs about {_gb(plan.total)} of memory at its peak, and {_gb(free)} are free. Lower "
        "training.batch_size (and raise gradient_accumulation_steps), set training.gradient_checkpointing, "
        "or model.quantization: 4bit."
    )


def memory_record(plan: MemoryPlan, prepared: Preparation, observed: int | None = None) -> dict[str, Any]:
    """For `ft train validate --json` and report.json, where what was observed stands beside it."""
    parts = {key: getattr(plan, key) for key in PARTS}
    record: dict[str, Any] = {"predicted_bytes": plan.total, "parts": parts}
    if observed is not None:
        record |= {"observed_bytes": observed, "predicted_of_observed_bytes": comparable(plan, prepared)}
    return record


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB"

"""How much memory a run needs at most, from sizes alone: before any weight is read.

Every term is counted from what the engines keep (`pytorch.py`, `mlx.py`), not fitted to runs.
`benchmarks/memory_plan.py` compares predictions with observed peaks; docs/memory.md has the table.
"""

from dataclasses import dataclass
from typing import NamedTuple

from finetune.models.architecture import Architecture
from finetune.planning import mlx, pytorch
from finetune.planning.planned import FLOAT32, PlannedRun

_ENGINES = {"mlx": mlx, "pytorch": pytorch}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes at the peak, by what they are for."""

    weights: int
    trained: int  # adapters or float32 masters, their gradients
    optimizer: int
    activations: int
    logits: int
    update: int  # what the update of the largest weight makes on its way
    holes: int  # freed memory that the C library keeps
    libraries: int
    present: int  # of the libraries, what the process holds already
    returns_memory: bool  # whether this is with `Engine.spare_memory`

    @property
    def arrays(self) -> int:
        """What MLX and CUDA count."""
        return self.weights + self.trained + self.optimizer + self.activations + self.logits + self.update

    @property
    def growth(self) -> int:
        """What the process takes besides what it holds already."""
        return self.total - self.present

    @property
    def total(self) -> int:
        """Of the whole process."""
        return self.arrays + self.holes + self.libraries


class _Moment(NamedTuple):
    """Bytes at one moment of a step, beside those that are always there."""

    gradients: int
    activations: int = 0
    logits: int = 0
    update: int = 0


def plan_memory(model: Architecture, run: PlannedRun) -> MemoryPlan:
    """The peak of a training step, with everything that stays around it."""
    engine = _ENGINES[run.engine]
    trained = _trained(model, run)
    copies = 0 if run.method == "full" and run.value_bytes == FLOAT32 else trained
    update = _Moment(FLOAT32 * trained, update=engine.updating(model, run))
    most = max(_in_passes(model, run), update, key=sum)
    return MemoryPlan(
        weights=engine.weights(model, run),
        trained=FLOAT32 * copies + most.gradients,
        optimizer=run.moments * FLOAT32 * trained,
        activations=most.activations,
        logits=most.logits,
        update=most.update,
        holes=engine.holes(model, run),
        libraries=engine.libraries(model, run),
        present=run.resident,
        returns_memory=run.returns_memory,
    )


def _trained(model: Architecture, run: PlannedRun) -> int:
    return model.parameters if run.method == "full" else run.adapter_parameters


def _in_passes(model: Architecture, run: PlannedRun) -> _Moment:
    """Most is needed in the loss, with activations of all layers and chunks of logits, or on the way back through the
    last layer. What MLX makes ahead in the loss may belong to that way already.
    """
    engine = _ENGINES[run.engine]
    kept = engine.kept(model, run)
    logits = engine.logits(model, run)
    layer = (kept.inner + kept.narrow) * run.tokens * run.value_bytes
    before = model.layers * (model.width * run.tokens * run.value_bytes if run.recompute else layer)
    back = layer * run.recompute + kept.passing * run.tokens * run.value_bytes + engine.unpacked(model, run)
    beside = engine.beside_loss(model, run) * back
    logits, last = (logits, beside) if logits + beside > back else (0, back)
    gradients = FLOAT32 * _trained(model, run) if engine.sums_gradients(run) else 0
    return _Moment(gradients, int(before + last), logits)

"""How much memory a run needs at most, from sizes alone: before any weight is read.

Every term is counted from what the engines keep, not fitted: what a layer keeps of a token for the backward pass is
a number of values, given by the widths of the model. `benchmarks/memory_plan.py` compares predictions with observed
peaks; docs/memory.md has the table.
"""

from dataclasses import dataclass
from typing import Literal

from finetune.models.architecture import Architecture

EngineName = Literal["mlx", "pytorch"]

FLOAT32 = 4
_GROUP = 64  # values of a quantised row that share a scale (MLX: and an offset)
_BLOCK = 128  # queries that attention computes together on a CPU
_KEPT_DOCUMENT = 512  # tokens up to which MLX keeps attention's probabilities
_LIBRARIES = {"mlx": 300 * 2**20, "pytorch": 420 * 2**20}  # of a process with the engine and transformers imported
_LOSS_ELEMENTS = {"mlx": 1 << 22, "pytorch": 7 << 20}  # logits computed at once
_LOSS_COPIES = {"mlx": 5, "pytorch": 3}  # float32 matrices of that size that live together
_UNPACKED = 1 << 20  # values that a product on a 4- or 8-bit base unpacks at once (MLX on a CPU)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What memory depends on, besides the model."""

    engine: EngineName
    method: Literal["lora", "dora", "full"]
    value_bytes: int  # of weights and activations: 4 for float32, 2 for 16 bits
    bits: int | None  # of the linear weights of a quantised base
    adapter_parameters: int  # 0 for full
    ranks: int  # of all adapted modules of a layer, added up
    moments: int  # float32 values that the optimizer keeps for each trained one
    tokens: int  # whose activations are in memory together
    longest: int  # tokens of the longest document
    trained: int  # tokens of `tokens` that are trained on
    recompute: bool = False  # gradient checkpointing
    workers: int = 1  # graphs that are computed side by side
    on_cpu: bool = True


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes at the peak, by what they are for."""

    libraries: int
    weights: int
    trained: int  # adapters or float32 masters, their gradients
    optimizer: int
    activations: int
    logits: int

    @property
    def arrays(self) -> int:
        """Without the libraries: what MLX and CUDA count."""
        return self.weights + self.trained + self.optimizer + self.activations + self.logits

    @property
    def total(self) -> int:
        """Of the whole process."""
        return self.libraries + self.arrays


def plan_memory(model: Architecture, run: PlannedRun) -> MemoryPlan:
    """The peak of a training step, with everything that stays around it."""
    trained = model.parameters if run.method == "full" else run.adapter_parameters
    return MemoryPlan(
        libraries=_LIBRARIES[run.engine],
        weights=_weights(model, run),
        trained=_trained(run, trained),
        optimizer=run.moments * FLOAT32 * trained,
        activations=_activations(model, run),
        logits=_logits(model, run),
    )


def _weights(model: Architecture, run: PlannedRun) -> int:
    if run.bits is None:
        return model.parameters * run.value_bytes
    scale_bytes = 2 * run.value_bytes if run.engine == "mlx" else FLOAT32
    packed = model.linear_weights * (run.bits / 8 + scale_bytes / _GROUP)
    return int(packed) + model.other_parameters * run.value_bytes


def _trained(run: PlannedRun, trained: int) -> int:
    """float32 weights and their gradients; MLX tunes a float32 base in place."""
    masters = 0 if run.method == "full" and run.engine == "mlx" and run.value_bytes == FLOAT32 else 1
    return (masters + 1) * FLOAT32 * trained


def _activations(model: Architecture, run: PlannedRun) -> int:
    layer, backward = _kept_values(model, run), _passing_values(model, run)
    kept = model.layers * model.width + layer if run.recompute else model.layers * layer
    return int(run.tokens * (kept + backward) * run.value_bytes) + _unpacked(model, run)


def _unpacked(model: Architecture, run: PlannedRun) -> int:
    """Matrices of a quantised base while a product uses them."""
    if run.bits is None:
        return 0
    largest = max(linear.weights for linear in model.linears)
    if run.engine == "mlx":
        return 4 * run.workers * min(largest, _UNPACKED) * FLOAT32
    return largest * run.value_bytes


def _kept_values(model: Architecture, run: PlannedRun) -> float:
    """Values that a layer keeps of each token.

    The hidden state and its norm, twice each; queries, keys, values and what attention gives; the products of the
    feed-forward part; x A of every adapter. DoRA keeps what each adapted product gave.
    """
    attention = 2 * model.query_width + 2 * model.kv_width
    kept = 4 * model.width + attention + _feed_forward(model, run) + run.ranks
    if run.method == "dora":
        kept += sum(linear.out_features for linear in model.linears)
    if run.engine == "mlx" and run.on_cpu and run.longest <= _KEPT_DOCUMENT:
        kept += model.heads * _seen_keys(run.longest)
    return kept


def _feed_forward(model: Architecture, run: PlannedRun) -> int:
    """Gate, up, their product; PyTorch, and MLX for other functions than SiLU, also keep the function of the gate."""
    if not model.gated:
        return 2 * model.inner
    own = run.engine == "mlx" and run.on_cpu and not model.model_type.startswith("gemma")
    return (3 if own else 4) * model.inner


def _seen_keys(longest: int) -> float:
    """Keys that a query of a document meets on average, in blocks of queries."""
    return min(longest, (longest + _BLOCK) / 2)


def _passing_values(model: Architecture, run: PlannedRun) -> float:
    """Values of each token that live while the last layer's gradients are computed, and no longer."""
    gradients = 3 * model.inner + 2 * model.width
    scores = model.heads * min(run.longest, _BLOCK) * run.longest / max(1, run.tokens)
    return gradients + 2 * scores


def _logits(model: Architecture, run: PlannedRun) -> int:
    rows = min(run.trained, max(64, _LOSS_ELEMENTS[run.engine] // model.vocabulary))
    chunk = rows * model.vocabulary * FLOAT32 * _LOSS_COPIES[run.engine] * run.workers
    hidden = 2 * run.trained * model.width * run.value_bytes
    head = 2 * model.vocabulary * model.width * FLOAT32 if run.method == "full" else 0
    return chunk + hidden + head

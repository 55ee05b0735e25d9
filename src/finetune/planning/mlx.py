"""What the MLX engine keeps of a training step, counted in values of each token.

mlx-lm's modules run unchanged, so `mx.grad` decides what is kept: the inputs of products with an adapter and of
functions that are not linear. Attention, SwiGLU and the loss are this project's own on a CPU.
"""

import math

from finetune.models.architecture import Architecture
from finetune.planning.planned import FLOAT32, Kept, PlannedRun

LIBRARIES = 120 * 2**20  # of a process that has loaded a model of no size
MODEL_CLASSES = 50 * 2**20  # of those, what is imported with the model and at the first step
_LOGITS = 1 << 22  # values that go through the loss together
_FEWEST_ROWS = 64
# Arrays of a chunk: logits, their distances from the largest, the two that exp is made of and its result, the gradient
# without and with the target; a soft cap adds two.
_LOSS_ARRAYS = 7
# On a CPU MLX makes the arrays of operations before it computes them, ten tasks of ten operations ahead for all streams
# together. In the loss these are the arrays of several chunks: so many, and two for each other stream's unfinished task
# (the loss alone, measured: 16 to 18 in one graph, 18 to 22 in two, whatever the number of chunks).
_AHEAD = 17
_HEADS_AHEAD = 3  # of them, sums of a trained head's gradients
_GROUP = 64  # values of a quantised row that share a scale and an offset
_UNPACKED = 1 << 20  # values of a matrix that a product unpacks at once on a CPU
_UNPACKING = 4  # arrays of that size
_BLOCK = 128  # queries that attention takes together on a CPU
_KEPT_DOCUMENT = 512  # tokens of a document up to which it keeps its weights


def kept(model: Architecture, run: PlannedRun) -> Kept:
    """By each layer: two sums, what two norms give, and what norms after products read."""
    reads = run.reads
    narrow = (reads.attention + reads.feed_forward + model.norms) * model.width + _attention(model, run) + run.ranks
    if model.query_norms:
        narrow += model.query_width + model.kv_width
    if run.method == "dora":
        narrow += sum(linear.out_features for linear in model.linears)
    return Kept(_feed_forward(model, run), narrow, _passing(model, run))


def _feed_forward(model: Architecture, run: PlannedRun) -> int:
    """SwiGLU as one function keeps its two inputs and its result. GELU's tanh form keeps five arrays."""
    if not model.gated:
        arrays = 4
    elif model.gelu:
        arrays = 6
    else:
        arrays = 2 if run.on_cpu and run.value_bytes == FLOAT32 else 4
    return (arrays + run.reads.product) * model.inner


def _attention(model: Architecture, run: PlannedRun) -> float:
    """What attention reads, and its result as heads and as rows; the weights where they are kept."""
    values = (2 + run.reads.result) * model.query_width + 2 * model.kv_width
    if model.fused_attention:
        values += model.query_width + 2 * model.kv_width  # the array that all three are parts of
    if model.soft_capped:
        return values + 2 * model.heads * run.longest  # scores within the cap, and weights
    if run.on_cpu and run.value_bytes == FLOAT32:
        return values + model.heads * (1 + (_seen(run.longest) if run.longest <= _KEPT_DOCUMENT else 0))
    return values


def _seen(longest: int) -> float:
    """Keys that a query meets on average, in blocks of queries."""
    return min(longest, (longest + _BLOCK) / 2)


def _passing(model: Architecture, run: PlannedRun) -> float:
    """Gradients on their way through a layer's loops over the feed-forward part, attention, and hidden states."""
    others = 6 * model.width + model.query_width + model.kv_width
    loops = (1 if model.gelu or not model.gated else 6) * model.inner  # arrays of SwiGLU's gradient, exp in two loops
    if model.soft_capped:
        return loops + others + 3 * model.heads * run.longest
    scores = 3 * model.heads * _seen(run.longest) if run.on_cpu and run.value_bytes == FLOAT32 else 0
    return max(loops, scores) + others  # one after the other


def weights(model: Architecture, run: PlannedRun) -> int:
    """The base. In float32 full tuning works on it in place."""
    if run.bits is None:
        return model.parameters * run.value_bytes
    if model.stored_bits is not None:  # files that hold embeddings like that, too, with scales in 16 bits
        return int(model.parameters * (run.bits / 8 + 4 / _GROUP))
    packed = model.linear_weights * (run.bits / 8 + 2 * run.value_bytes / _GROUP)
    return int(packed) + model.other_parameters * run.value_bytes


def unpacked(model: Architecture, run: PlannedRun) -> int:
    """The part of a quantised matrix that a product is reading; GPUs multiply by packed values."""
    if run.bits is None or not run.on_cpu:
        return 0
    largest = max(linear.weights for linear in model.linears)
    return _UNPACKING * run.graphs * min(largest, _UNPACKED) * run.value_bytes


def logits(model: Architecture, run: PlannedRun) -> int:
    """The chunks of the loss that are under way, hidden states with their gradients, and a trained head's gradients."""
    chunk = _chunk_rows(model) * model.vocabulary * FLOAT32
    heads = min(math.ceil(_chunks(model, run)), _HEADS_AHEAD) if run.method == "full" else 0
    hidden = 2 * run.trained * model.width * run.value_bytes
    return int(_loss_arrays(model, run) * chunk) + heads * model.vocabulary * model.width * FLOAT32 + hidden


def beside_loss(model: Architecture, run: PlannedRun) -> float:
    """The part of what MLX has made ahead that belongs to the backward pass when the loss has most in memory."""
    return 1.0 - _loss_arrays(model, run) / _most_ahead(run) if run.on_cpu else 1.0


def _loss_arrays(model: Architecture, run: PlannedRun) -> float:
    """Of a whole chunk's size."""
    arrays = (_LOSS_ARRAYS + 2 * model.capped_logits) * _chunks(model, run)
    return min(arrays, _most_ahead(run))


def _most_ahead(run: PlannedRun) -> int:
    return _AHEAD + 2 * (run.graphs - 1)


def _chunks(model: Architecture, run: PlannedRun) -> float:
    """Of all graphs. A GPU is taken to compute one at a time."""
    chunks = run.trained / _chunk_rows(model)
    return chunks if run.on_cpu else min(1.0, chunks)


def _chunk_rows(model: Architecture) -> int:
    return max(_FEWEST_ROWS, _LOGITS // model.vocabulary)


def sums_gradients(run: PlannedRun) -> bool:
    """Whether all gradients are there before the backward pass ends: those of the micro-batches before."""
    return run.method != "full" or run.calls > 1


def updating(model: Architecture, run: PlannedRun) -> int:
    """Arrays of the largest weight: what replaces it and its moments, and as much again on the way, but for what is
    computed in the memory of something else. Of adapters none is large.
    """
    largest = max(model.vocabulary * model.width, *(linear.weights for linear in model.linears))
    return 3 * (run.moments + 1) * largest * FLOAT32 if run.method == "full" else 0


def holes(model: Architecture, run: PlannedRun) -> int:
    """None: MLX asks for blocks of any alignment, which fit where one of their size was."""
    return 0


def libraries(model: Architecture, run: PlannedRun) -> int:
    """The process without arrays."""
    return max(LIBRARIES, run.resident + MODEL_CLASSES)

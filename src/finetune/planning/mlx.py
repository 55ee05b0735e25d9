"""What the MLX engine keeps of a training step, counted in values of each token.

mlx-lm's modules run unchanged, so `mx.grad` decides what is kept: the inputs of products with an adapter and of
functions that are not linear. Attention, SwiGLU and the loss are this project's own on a CPU.
"""

from finetune.models.architecture import Architecture
from finetune.planning.planned import FLOAT32, Kept, PlannedRun

LIBRARIES = 300 * 2**20  # of a process that has loaded a model of no size
MODEL_CLASSES = 40 * 2**20  # of those, what is imported with the model and at the first step
_LOGITS = 1 << 22  # values that go through the loss together
_FEWEST_ROWS = 64
_LOSS_COPIES = 6  # of them: logits, their distances from the largest, what exp is made of, and its result
_GROUP = 64  # values of a quantised row that share a scale and an offset
_UNPACKED = 1 << 20  # values of a matrix that a product unpacks at once on a CPU
_UNPACKING = 4  # arrays of that size
_BLOCK = 128  # queries that attention takes together on a CPU
_KEPT_DOCUMENT = 512  # tokens of a document up to which it keeps its weights


def kept(model: Architecture, run: PlannedRun) -> Kept:
    """By each layer: two sums, what two norms give, and what norms after products read."""
    reads = run.reads
    narrow = (reads.attention + reads.feed_forward + model.norms) * model.width + _attention(model, run) + run.ranks
    if model.gated and model.norms == 2:
        narrow += model.width  # measured: one hidden state more than gradients need
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
    scores = 3 * model.heads * run.longest if model.soft_capped else 0
    loops = 1 if model.gelu or not model.gated else 6  # arrays of SwiGLU's gradient, with exp in two loops
    return loops * model.inner + 6 * model.width + model.query_width + model.kv_width + scores


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
    """A chunk of the loss, and hidden states with their gradients; a trained head's gradients.

    Graphs side by side are not in their losses at the same moment. Measured: another one adds half a chunk, and nothing
    where recomputing a layer comes after the loss.
    """
    rows = min(run.trained, max(_FEWEST_ROWS, _LOGITS // model.vocabulary))
    chunks = 1 if run.recompute else (1 + run.graphs) / 2
    chunk = int(rows * model.vocabulary * FLOAT32 * (_LOSS_COPIES + model.capped_logits) * chunks)
    head = 2 * model.vocabulary * model.width * FLOAT32 if run.method == "full" else 0
    return chunk + 2 * run.trained * model.width * run.value_bytes + head


def holes(model: Architecture, run: PlannedRun, kept: Kept, logits: int) -> int:
    """None: MLX asks for blocks of any alignment, which fit where one of their size was."""
    return 0


def libraries(run: PlannedRun) -> int:
    """The process without arrays."""
    return max(LIBRARIES, run.resident + MODEL_CLASSES)

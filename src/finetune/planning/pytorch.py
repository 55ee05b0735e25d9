"""What the PyTorch engine keeps of a training step, counted in values of each token.

transformers' modules run unchanged, so autograd decides what is kept: the inputs of products with an adapter and of
functions that are not linear. Norms, attention, products with adapters and the loss are this project's own.
"""

from typing import NamedTuple

from finetune.models.architecture import Architecture
from finetune.planning.planned import FLOAT32, Kept, PlannedRun

LIBRARIES = 376 * 2**20  # of a process that has taken steps with a model of no size
_BITSANDBYTES = 56 * 2**20  # imported for 4 bits
MODEL_CLASSES = 36 * 2**20  # of those, what is imported with the model and at the first steps
_LOGITS = 7 << 20  # values that go through the loss together
_FEWEST_ROWS = 64
# What oneDNN compiles for products in 16 bits on a CPU, for each shape: of a linear module on the way there, on the way
# back, and of its adapter. So many stay (the engine sets that limit).
_COMPILED = 128
_COMPILED_FOR_EACH = 3
_COMPILED_BYTES = 2**19
_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)  # of NF4: the scales of its blocks, themselves in 8 bits

# PyTorch asks for aligned blocks, and glibc before 2.38 finds room for one only in a hole that is larger: what a layer
# frees is not filled by the next layer's arrays of that size. Blocks above the limit are mapped one by one, and leave
# no hole.
_LARGEST_IN_HEAP = {False: 32 * 2**20, True: 4 * 2**20}  # by `returns_memory`


class _Freed(NamedTuple):
    """Values of each token that a layer's forward pass makes and does not keep."""

    inner: int  # in arrays as wide as the feed-forward part
    narrow: int  # in other arrays


def kept(model: Architecture, run: PlannedRun) -> Kept:
    """By each layer; passing are the gradients of the two factors of the feed-forward product and of hidden states."""
    narrow = 2 * model.width + _norms(model, run) + _attention(model, run) + run.ranks
    if run.method == "dora":
        narrow += _adapted_products(model, run)
    # GPT-2's GELU is six operations, of which five keep something; other models gate with one function.
    inner = ((3 if model.gated else 4) + run.reads.product) * model.inner
    return Kept(inner, narrow, 2 * model.inner + 2 * model.width)


def _norms(model: Architecture, run: PlannedRun) -> float:
    """What norms give to products, and what those that follow a product read.

    A trained norm is transformers' own, in float32: it keeps what it read, if in 16 bits, and what it normed twice.
    """
    values = float((run.reads.attention + run.reads.feed_forward + model.norms - 2) * model.width)
    if model.query_norms:
        values += model.query_width + model.kv_width
    if run.method == "full" and model.gated:
        float_copies = 0.0 if run.value_bytes == FLOAT32 else FLOAT32 / run.value_bytes
        values += (1 + float_copies) * model.norms * model.width
    return values


def _attention(model: Architecture, run: PlannedRun) -> float:
    """Queries, keys and values as attention reads them, and its result: of each document, and end to end."""
    blocks, rows = _in_blocks(model, run), run.reads.result * model.query_width
    if model.soft_capped and not blocks:
        repeated = 3 * model.query_width  # keys and values for every head
        return rows + repeated + run.longest * (2 * model.heads + 1 / run.value_bytes)  # tanh, weights, and a mask
    values = 2 * model.query_width + 2 * model.kv_width + (0 if blocks else rows)
    if model.fused_attention and model.rotary:
        values += model.query_width + model.kv_width  # values are a part of an array with all three
    return values


def _in_blocks(model: Architecture, run: PlannedRun) -> bool:
    """Whether attention is the project's own on the CPU, which keeps nothing but what it reads."""
    return run.on_cpu and (run.value_bytes < FLOAT32 or model.soft_capped)


def _adapted_products(model: Architecture, run: PlannedRun) -> int:
    """DoRA keeps what each product gave, as far as nothing else does. A bias makes another array of it."""
    values = 0 if model.norms == 4 else (run.reads.result + run.reads.product) * model.width
    if not (model.fused_attention or model.query_norms):
        values += run.reads.attention * (model.query_width + model.kv_width)
    if model.soft_capped and not _in_blocks(model, run):
        values += run.reads.attention * model.kv_width
    values += run.reads.attention * _with_bias(model, "v_proj", "c_attn")
    return values + run.reads.feed_forward * _with_bias(model, "gate_proj", "up_proj", "c_fc")


def _with_bias(model: Architecture, *names: str) -> int:
    """Values of a token that these products give, where they have a bias."""
    found = (linear for linear in model.linears if linear.name.rpartition(".")[2] in names)
    return sum(linear.out_features for linear in found if linear.bias)


def weights(model: Architecture, run: PlannedRun) -> int:
    """The base. In float32 full tuning works on it in place."""
    if run.bits is None:
        return model.parameters * run.value_bytes
    rows = model.layers * sum(linear.out_features for linear in model.linears)
    scales = _SCALE_BYTES * model.linear_weights if run.bits == 4 else 2 * rows
    return int(model.linear_weights * run.bits / 8 + scales) + model.other_parameters * run.value_bytes


def unpacked(model: Architecture, run: PlannedRun) -> int:
    """The matrix of a quantised base that a product is reading."""
    return 0 if run.bits is None else max(linear.weights for linear in model.linears) * run.value_bytes


def logits(model: Architecture, run: PlannedRun) -> int:
    """A chunk, the hidden states and their gradients.

    A trained head has the sum of its gradients, those of the chunk, and a copy on the way.
    """
    head = 3 * model.vocabulary * model.width * run.value_bytes if run.method == "full" else 0
    return _chunk(model, run) + 2 * run.trained * model.width * run.value_bytes + head


def _chunk(model: Architecture, run: PlannedRun) -> int:
    """Logits as the head gives them and in float32; a soft cap keeps two more on the way to its gradient."""
    rows = min(run.trained, max(_FEWEST_ROWS, _LOGITS // model.vocabulary // 16 * 16))
    return rows * model.vocabulary * (run.value_bytes * (3 if model.capped_logits else 1) + FLOAT32)


def beside_loss(model: Architecture, run: PlannedRun) -> float:
    """The part of the backward pass that is in memory with the logits."""
    return 0.0


def sums_gradients(run: PlannedRun) -> bool:
    """Always: they are added up in one buffer that stays."""
    return True


def updating(model: Architecture, run: PlannedRun) -> int:
    """None: a few values are updated at a time, in place."""
    return 0


def holes(model: Architecture, run: PlannedRun) -> int:
    """Memory that the heap holds beside a step's arrays, on a CPU: what every layer has freed, and a chunk of the loss.

    Of a chunk's arrays half are freed while others are made; with a soft cap as many as are there at once.
    """
    if not run.on_cpu:
        return 0
    limit = _LARGEST_IN_HEAP[run.returns_memory]
    token, freed = run.tokens * run.value_bytes, _freed(model, run)
    chunk = _chunk(model, run)
    parts = [
        (model.inner * token, model.layers * freed.inner * token),
        (model.width * token, model.layers * freed.narrow * token),
        (min(chunk, _LOGITS * FLOAT32), chunk if model.capped_logits else chunk // 2),
    ]
    return int(sum(size for block, size in parts if block < limit))


def _freed(model: Architecture, run: PlannedRun) -> _Freed:
    """Queries and keys before they are turned and three arrays on the way, and what the last product of each part gave.

    Of a chain of operations on arrays of one size, as GPT-2's GELU, two are left: a third fits where they were.
    """
    turned = (3 if model.fused_attention else 4) * (model.query_width + model.kv_width) * model.rotary
    narrow = turned + 2 * model.width - (_adapted_products(model, run) if run.method == "dora" else 0)
    return _Freed(0 if model.gated else 2 * model.inner, max(0, narrow))


def libraries(model: Architecture, run: PlannedRun) -> int:
    """The process without arrays."""
    found = max(LIBRARIES, run.resident + MODEL_CLASSES) + (_BITSANDBYTES if run.bits == 4 else 0)
    if run.on_cpu and run.value_bytes < FLOAT32:
        found += _COMPILED_BYTES * min(_COMPILED, _COMPILED_FOR_EACH * len(model.linears) * run.sizes)
    return found

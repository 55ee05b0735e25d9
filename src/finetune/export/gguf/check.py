"""Whether a GGUF file answers like the model that it was made from: in llama.cpp, or else by its own tensors."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.core.types import Batch, Dtype, FloatArray, IntArray
from finetune.export.gguf.quantize import Scheme
from finetune.export.gguf.writer import ModelFile
from finetune.export.llamacpp import LlamaCpp
from finetune.export.verify import TOLERANCES, Comparison, Divergence, largest, mean_divergence

# The most likely tokens whose probabilities are asked for; all others count as one outcome. A divergence over joined
# outcomes is never larger than the true one, and what is joined here has next to no probability.
TOP = 2048
# llama.cpp looks GELU up in a table of half-precision values; SiLU is computed.
GELU_TOLERANCE = 5e-3


class Position(NamedTuple):
    """A place in a probe row: the tokens before it, and the one that follows."""

    context: IntArray
    target: int


def positions(batches: Sequence[Batch]) -> Iterator[Position]:
    """The scored positions of batches of one row, in the order of `InferenceSession.logprobs`."""
    for batch in batches:
        for place in np.flatnonzero(batch.loss_mask[0]):
            yield Position(batch.inputs[0, : place + 1], int(batch.targets[0, place]))


def compare_running(
    server: LlamaCpp,
    places: Sequence[Position],
    *,
    original: FloatArray,
    base: FloatArray,
    tolerance: float | None,
    reason: str,
) -> Comparison:
    """Compare what llama.cpp says with log-probabilities [positions, V] of the tuned model and its base."""
    rows: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    differences, effects = [0.0], [0.0]
    for place, p, before in zip(places, original, base, strict=True):
        q = server.next_logprobs(place.context, p.shape[0], top=TOP)
        seen = np.flatnonzero(np.isfinite(q)).astype(np.int32)
        rows.append((_joined(p, seen), _joined(before, seen), _joined(q, seen)))
        if np.isfinite(q[place.target]):
            differences.append(largest(q[place.target] - p[place.target]))
        effects.append(largest(before[place.target] - p[place.target]))
    truth, untuned, exported = (list(column) for column in zip(*rows, strict=True))
    return Comparison(
        tokens=len(places),
        largest_difference=max(differences),
        adapter_effect=max(effects),
        tolerance=tolerance,
        reason=reason,
        divergence=Divergence(len(places), mean_divergence(truth, exported), mean_divergence(truth, untuned)),
    )


def _joined(row: FloatArray, seen: IntArray) -> FloatArray:
    """The log-probabilities of the seen tokens, and of all others together."""
    chosen = row[seen].astype(np.float64)
    rest = max(1.0 - float(np.exp(chosen).sum()), 1e-12)
    return np.append(chosen, np.log(rest)).astype(np.float32)


def allowed(scheme: Scheme, rounded: Iterable[Dtype], *, gelu: bool) -> tuple[float | None, str]:
    """How far log-probabilities may be apart, and why. None: a quantised file is told, not judged.

    `rounded` are the types to which products or weights were rounded on the way, beside the type of the file.
    """
    if not scheme.is_float:
        return None, f"weights are quantised to {scheme.name}"
    stored = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[scheme.base]
    widest = max((stored, *rounded), key=lambda name: TOLERANCES[name])
    if gelu and TOLERANCES[widest] < GELU_TOLERANCE:
        return GELU_TOLERANCE, "llama.cpp looks GELU up in a table"
    reason = "float32 rounding only" if widest == "float32" else f"weights or products are rounded to {widest}"
    return TOLERANCES[widest], reason


def largest_error(file: Path, content: ModelFile) -> float:
    """Read a file back and compare each tensor with what was to be written: the largest error, relative to its norm.

    NaN counts as infinite, and so does a tensor that is missing.
    """
    from gguf import GGUFReader, quants

    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    errors = [0.0]
    for tensor in content.plan.tensors:
        stored = found.get(tensor.name)
        if stored is None:
            return float("inf")
        wanted = tensor.read()
        values = quants.dequantize(stored.data, stored.tensor_type).reshape(wanted.shape)
        errors.append(float(np.linalg.norm(values - wanted)) / max(float(np.linalg.norm(wanted)), 1e-30))
    worst = max(errors)
    return float("inf") if np.isnan(sum(errors)) else worst

"""An export must answer like the original: log-probabilities of the same rows are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.core.types import Batch, FloatArray
from finetune.engines.base import InferenceSession

# Largest allowed difference of a log-probability, by the type in which the merged weights are stored. An adapter
# that is only copied or transposed computes the same products, so float32 noise is all that may differ. Merged
# weights are rounded once to the base's type: a relative error of 2^-9 (bfloat16) or 2^-12 (float16) in every
# weight, which adds up through the layers and is largest for unlikely tokens.
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The largest differences of log-probabilities, in nats, over the probe rows."""

    tokens: int
    largest_difference: float  # export against original; NaN counts as infinite
    adapter_effect: float  # original against base: what would be lost if nothing of the tuning had survived
    tolerance: float
    reason: str  # why the tolerance is what it is

    @property
    def holds(self) -> bool:
        """Whether the export answers like the original."""
        return self.largest_difference <= self.tolerance


def logprobs(session: InferenceSession, batches: Sequence[Batch], *, adapter: str | None = None) -> FloatArray:
    """log p of every trained token of the batches, in one line."""
    parts = [session.token_logprobs(batch, adapter=adapter)[batch.loss_mask] for batch in batches]
    return np.concatenate(parts)


def compare(*, base: FloatArray, original: FloatArray, exported: FloatArray, stored_as: str) -> Comparison:
    """Compare arrays of `logprobs`. `stored_as` is the type of the exported weights, a key of TOLERANCES."""
    reason = {
        "float32": "float32 rounding only",
        "float16": "merged weights are rounded to the base's float16",
        "bfloat16": "merged weights are rounded to the base's bfloat16",
    }[stored_as]
    return Comparison(
        tokens=len(original),
        largest_difference=_largest(exported - original),
        adapter_effect=_largest(original - base),
        tolerance=TOLERANCES[stored_as],
        reason=reason,
    )


def _largest(differences: FloatArray) -> float:
    largest = float(np.abs(differences).max())
    return float("inf") if np.isnan(largest) else largest

"""An export must answer like the original: log-probabilities of the same rows are compared."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from finetune.core.types import Batch, FloatArray
from finetune.engines.base import InferenceSession

# Largest allowed difference of a log-probability, by the type in which the merged weights are stored. An adapter
# that is only copied or transposed computes the same products, so float32 noise is all that may differ. Merged
# weights are rounded once to the base's type: a relative error of 2^-9 (bfloat16) or 2^-12 (float16) in every
# weight, which adds up through the layers and is largest for unlikely tokens.
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}

# Weights that are quantised again move further than any of these. They may move the predictions away from the tuned
# model by a quarter of the divergence that tuning made. A divergence grows with the square of a small change, so
# that is where half of the adapter is gone: nearer to the base than to what was tuned.
LARGEST_SHARE = 0.25

_DISTRIBUTION_ELEMENTS = 1 << 24  # of log-probabilities held at once for one model: 64 MB


class Scores(NamedTuple):
    """What a model says about the probe rows."""

    targets: FloatArray  # [tokens] log p of each trained token
    distributions: FloatArray  # [positions, V] log p of the whole vocabulary, at some of them


@dataclass(frozen=True, slots=True)
class Divergence:
    """Kullback-Leibler divergences from the original's predictions, in nats a token, over `positions` of them."""

    positions: int
    exported: float  # KL(original || exported): what the export lost; NaN counts as infinite
    base: float  # KL(original || base): what tuning changed

    @property
    def share(self) -> float:
        """Of what tuning changed, the part that the export is away from it."""
        return self.exported / self.base if self.base else float("inf") if self.exported else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The largest differences of log-probabilities, in nats, over the probe rows, and the divergences."""

    tokens: int
    largest_difference: float  # export against original; NaN counts as infinite
    adapter_effect: float  # original against base: what would be lost if nothing of the tuning had survived
    tolerance: float | None  # None: weights that were quantised again are judged by the divergence
    reason: str  # why the tolerance is what it is
    divergence: Divergence

    @property
    def holds(self) -> bool:
        """Whether the export answers like the original."""
        if self.tolerance is None:
            return self.divergence.share <= LARGEST_SHARE
        return self.largest_difference <= self.tolerance


def scores(session: InferenceSession, batches: Sequence[Batch], *, adapter: str | None = None) -> Scores:
    """Score the batches with the base (None) or an adapter."""
    targets = [session.token_logprobs(batch, adapter=adapter)[batch.loss_mask] for batch in batches]
    first = session.logprobs(thinned(batches[0], 1), adapter=adapter)
    share = max(1, _DISTRIBUTION_ELEMENTS // first.shape[1] // len(batches))
    few = [session.logprobs(thinned(batch, share), adapter=adapter) for batch in batches]
    return Scores(np.concatenate(targets), np.concatenate(few))


def thinned(batch: Batch, most: int) -> Batch:
    """The same batch, of whose trained positions at most this many, evenly spread, stay."""
    trained = np.flatnonzero(batch.loss_mask)
    chosen = trained[np.linspace(0, len(trained) - 1, min(most, len(trained))).astype(int)]
    mask = np.zeros(batch.loss_mask.size, np.bool_)
    mask[chosen] = True
    return replace(batch, loss_mask=mask.reshape(batch.loss_mask.shape))


def compare(*, base: Scores, original: Scores, exported: Scores, stored_as: str, requantised: bool) -> Comparison:
    """Compare three models. `stored_as` is the type of the exported weights, a key of TOLERANCES."""
    reason = {
        "float32": "float32 rounding only",
        "float16": "merged weights are rounded to the base's float16",
        "bfloat16": "merged weights are rounded to the base's bfloat16",
    }[stored_as]
    return Comparison(
        tokens=len(original.targets),
        largest_difference=largest(exported.targets - original.targets),
        adapter_effect=largest(original.targets - base.targets),
        tolerance=None if requantised else TOLERANCES[stored_as],
        reason="merged weights are quantised again" if requantised else reason,
        divergence=Divergence(
            positions=len(original.distributions),
            exported=mean_divergence(original.distributions, exported.distributions),
            base=mean_divergence(original.distributions, base.distributions),
        ),
    )


def mean_divergence(p: Iterable[FloatArray], q: Iterable[FloatArray]) -> float:
    """KL(p || q) = sum p (log p - log q), of rows of log-probabilities [N, V]; the mean over the rows, in nats."""
    mean = float(np.mean(list(_divergences(p, q))))
    return float("inf") if np.isnan(mean) else max(0.0, mean)


def _divergences(p: Iterable[FloatArray], q: Iterable[FloatArray]) -> Iterator[float]:
    """Row by row, so that only one row is in double precision at a time."""
    for log_p, log_q in zip(p, q, strict=True):
        wide = log_p.astype(np.float64)
        yield float(np.exp(wide) @ (wide - log_q))


def largest(differences: FloatArray) -> float:
    """The largest absolute value; NaN counts as infinite."""
    found = float(np.abs(differences).max())
    return float("inf") if np.isnan(found) else found

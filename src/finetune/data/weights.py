"""Each row as often as the weight of its file says."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from finetune.data.columns import Positions, at, pieces_of, release, row_array, shuffled, stored, where
from finetune.data.loaded import LoadedData


def weighted(positions: Positions, loaded: LoadedData, seed: int) -> tuple[Positions, Positions]:
    """Ascending positions with their repeats, and those that are left out.

    Weight 2.5 takes every row twice and, chosen by the seed, half of them a third time.
    """
    if all(file.weight == 1 for file in loaded.files):
        return positions, np.empty(0, np.int64)
    times = _times(positions, loaded, seed)
    left_out = where(times, lambda often: often == 0)
    return _repeated(positions, times), at(positions, left_out)


def _times(positions: Positions, loaded: LoadedData, seed: int) -> Positions:
    """How often each is taken."""
    times, ends = row_array(len(positions), np.int64), np.searchsorted(positions, loaded.starts)
    weights = np.array([file.weight for file in loaded.files])
    rows = dict.fromkeys(weights.tolist(), 0)
    for weight, first, end in zip(weights.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        times[first:end] = int(weight)
        rows[weight] += end - first
    left = {weight: round((weight - int(weight)) * count) for weight, count in rows.items()}
    if any(left.values()):
        _add_parts(times, weights, ends, left, seed)
    release(times)
    return times


def _add_parts(
    times: Positions, weights: npt.NDArray[np.float64], ends: Positions, left: Mapping[float, int], seed: int
) -> None:
    """Once more for so many rows of each weight: the first in an order that the seed draws."""
    rest = dict(left)
    order = shuffled(len(times), np.random.Generator(np.random.PCG64([seed, 1])))
    for drawn in pieces_of(order):
        weights_of = weights[np.searchsorted(ends, drawn, side="right") - 1]
        for weight in rest:
            members = drawn[weights_of == weight][: rest[weight]]
            times[members] += 1
            rest[weight] -= len(members)
        release(times)


def _repeated(positions: Positions, times: Positions) -> Positions:
    """`np.repeat(positions, times)`."""
    parts = zip(pieces_of(positions), pieces_of(times), strict=True)
    return stored((np.repeat(rows, often) for rows, often in parts), np.int64)

"""From a batch to what the model reads: documents end to end without padding, or rows side by side.

Documents end to end ([1, N]) cost nothing for padding and need attention that keeps them apart. A model that
cannot be told where its documents end reads each in a row of its own instead; loss and gradients are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from finetune.core.types import Batch, BoolArray
from finetune.engines.mlx import compat

Places: TypeAlias = npt.NDArray[np.intp]  # indices into the B x T tokens of a batch


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a row lie. Stands in for mlx-lm's cache and mask, which models hand on to attention."""

    lengths: tuple[int, ...]
    window: int | None = None  # keys that a query sees, itself included
    offset: ClassVar[int] = 0  # rotary embeddings are relative: a row's positions may run on

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, end) of each document."""
        return pairwise(accumulate(self.lengths, initial=0))

    @property
    def positions(self) -> Any:
        """[1, N], each document from 0: for models that learn an embedding of each position."""
        return mx.concatenate([mx.arange(length) for length in self.lengths])[None]

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None) -> "Documents":
        """Called by mlx-lm. A model that computes with the mask itself cannot take documents."""
        if return_array:
            raise TypeError("the model needs its mask as an array")
        return replace(self, window=window_size)

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Called by mlx-lm: nothing is cached."""
        return keys, values


@dataclass(frozen=True, slots=True)
class Positions:
    """The trained positions of one call of the model, flattened: what the loss is taken over."""

    rows: Any  # [N] indices into the B x T positions
    targets: Any  # [N]


@dataclass(frozen=True, slots=True)
class Arranged:
    """One call of the model."""

    inputs: Any  # [B, T]
    cache: list[Documents] | None
    positions: Positions
    places: Places  # of the trained positions, in the order of `positions`


def arrange(batch: Batch, *, layers: int, takes_documents: bool) -> list[Arranged]:
    """The calls that compute a batch; padding is left out where the model takes documents and that costs nothing."""
    packed = batch.segments.max(initial=0) > 1
    if takes_documents and (packed or compat.on_cpu()):
        return [_end_to_end(batch, layers)]
    if packed:
        return [_side_by_side(batch, group) for group in _groups(batch)]
    rows = np.flatnonzero(batch.loss_mask)
    return [Arranged(mx.array(batch.inputs), None, _positions(rows, batch, rows), rows)]


def _positions(rows: Places, batch: Batch, places: Places) -> Positions:
    return Positions(mx.array(rows.astype(np.int32)), mx.array(batch.targets.reshape(-1)[places]))


def _documents(batch: Batch) -> list[Places]:
    """The places of each document's tokens, in the order of the rows."""
    segments = batch.segments
    numbers = segments + (segments.max(initial=0) + 1) * np.arange(len(segments))[:, None]
    real = np.flatnonzero(segments)
    starts = np.flatnonzero(np.diff(numbers.reshape(-1)[real])) + 1
    return np.split(real, starts)


def _end_to_end(batch: Batch, layers: int) -> Arranged:
    documents = Documents(tuple(map(len, _documents(batch))))
    real = np.flatnonzero(batch.segments)
    rows = np.flatnonzero(batch.loss_mask.reshape(-1)[real])
    inputs = mx.array(batch.inputs.reshape(1, -1)[:, real])
    return Arranged(inputs, [documents] * layers, _positions(rows, batch, real[rows]), real[rows])


def _groups(batch: Batch) -> Iterator[list[Places]]:
    """Documents that are trained on, by length, as many together as fit into the size of the batch."""
    trained: BoolArray = batch.loss_mask.reshape(-1)
    group: list[Places] = []
    for document in sorted((places for places in _documents(batch) if trained[places].any()), key=len):
        if group and len(document) * (len(group) + 1) > batch.inputs.size:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _side_by_side(batch: Batch, group: Sequence[Places]) -> Arranged:
    width = len(group[-1])
    inputs = np.zeros((len(group), width), np.int32)
    rows, places = [], []
    for number, document in enumerate(group):
        inputs[number, : len(document)] = batch.inputs.reshape(-1)[document]
        within = np.flatnonzero(batch.loss_mask.reshape(-1)[document])
        rows.append(number * width + within)
        places.append(document[within])
    trained = np.concatenate(places)
    return Arranged(mx.array(inputs), None, _positions(np.concatenate(rows), batch, trained), trained)

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

from finetune.core.types import Batch, IntArray
from finetune.engines.dealing import calls_of_each
from finetune.engines.mlx import compat

Places: TypeAlias = npt.NDArray[np.intp]  # indices into the B x T tokens of a batch


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a row lie. Stands in for mlx-lm's cache and mask, which models hand on to attention."""

    lengths: tuple[int, ...]
    window: int | None = None  # keys that a query sees, itself included
    offset: ClassVar[int] = 0  # rotary embeddings are relative: a row's positions may run on
    longest: ClassVar[int] = 0  # nothing was read before

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, end) of each document."""
        return pairwise(accumulate(self.lengths, initial=0))

    def positions(self, length: int) -> Any:
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
class Document:
    """One document of a batch that is trained on."""

    tokens: IntArray
    trained: Places  # indices into `tokens`
    targets: IntArray  # of the trained positions
    places: Places  # of the trained positions among the batch's B x T

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Arranged:
    """One call of the model."""

    inputs: Any  # [B, T]
    cache: list[Documents] | None
    positions: Positions
    places: Places  # of the trained positions among the batch's B x T, in the order of `positions`


def arrange(batch: Batch, *, layers: int, takes_documents: bool) -> list[Arranged]:
    """The calls that compute a batch; padding is left out where the model takes documents and that costs nothing."""
    packed = batch.segments.max(initial=0) > 1
    if takes_documents and (packed or compat.on_cpu()):
        return [end_to_end(documents_of(batch), layers)]
    if packed:
        return [_side_by_side(group) for group in _groups(documents_of(batch), batch.inputs.size)]
    rows = np.flatnonzero(batch.loss_mask)
    targets = batch.targets.reshape(-1)[rows]
    return [Arranged(mx.array(batch.inputs), None, _positions(rows, targets), rows)]


def arrange_for_workers(batches: Sequence[Batch], *, layers: int, workers: int) -> list[list[Arranged]]:
    """The calls of each worker: all documents of a step dealt out evenly, and a few of them to a call."""
    documents = [document for batch in batches for document in documents_of(batch)]
    share = max(batch.inputs.size for batch in batches) // workers
    hands = calls_of_each([len(document) for document in documents], workers=workers, share=share)
    return [[end_to_end([documents[number] for number in call], layers) for call in hand] for hand in hands]


def documents_of(batch: Batch) -> list[Document]:
    """The documents that are trained on, in the order of the rows."""
    numbers = batch.segments + (batch.segments.max(initial=0) + 1) * np.arange(len(batch.segments))[:, None]
    real = np.flatnonzero(batch.segments)
    starts = np.flatnonzero(np.diff(numbers.reshape(-1)[real])) + 1
    mask, inputs, targets = batch.loss_mask.reshape(-1), batch.inputs.reshape(-1), batch.targets.reshape(-1)
    documents = []
    for places in np.split(real, starts):
        trained = np.flatnonzero(mask[places])
        if len(trained):
            documents.append(Document(inputs[places], trained, targets[places[trained]], places[trained]))
    return documents


def end_to_end(documents: Sequence[Document], layers: int) -> Arranged:
    """All documents in one row without padding."""
    offsets = accumulate(map(len, documents), initial=0)
    rows = [offset + document.trained for offset, document in zip(offsets, documents, strict=False)]
    row = np.concatenate([document.tokens for document in documents])
    cache = [Documents(tuple(map(len, documents)))] * layers
    return _arranged(row[None], cache, rows, documents)


def _side_by_side(documents: Sequence[Document]) -> Arranged:
    """A row for each document, padded to the longest."""
    inputs = np.zeros((len(documents), max(map(len, documents))), np.int32)
    rows = []
    for number, document in enumerate(documents):
        inputs[number, : len(document)] = document.tokens
        rows.append(number * inputs.shape[1] + document.trained)
    return _arranged(inputs, None, rows, documents)


def _groups(documents: Sequence[Document], size: int) -> Iterator[list[Document]]:
    """Documents by length, as many together as fit into `size` tokens with their padding."""
    group: list[Document] = []
    for document in sorted(documents, key=len):
        if group and len(document) * (len(group) + 1) > size:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _arranged(
    inputs: IntArray, cache: list[Documents] | None, rows: Sequence[Places], documents: Sequence[Document]
) -> Arranged:
    targets, places = (
        np.concatenate(arrays) for arrays in zip(*((d.targets, d.places) for d in documents), strict=True)
    )
    return Arranged(mx.array(inputs), cache, _positions(np.concatenate(rows), targets), places)


def _positions(rows: Places, targets: IntArray) -> Positions:
    return Positions(mx.array(rows.astype(np.int32)), mx.array(targets))

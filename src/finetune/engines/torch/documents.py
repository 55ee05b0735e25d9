"""A batch without its padding: all documents of all rows end to end, as the model reads them.

Linear layers see [N, D] real tokens whatever the lengths of the rows, and attention is computed document by
document. Padded and packed batches end up the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune.core.types import Batch, IntArray


@dataclass(frozen=True, slots=True)
class Documents:
    """How many tokens each document has, in their order."""

    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The real tokens of a batch on the device, and where it is trained on."""

    tokens: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64, restart for each document
    documents: Documents  # lengths sum to N
    rows: Tensor  # [n] int64, indices into N that are trained on
    targets: Tensor  # [n] int64


def flatten(batch: Batch, device: torch.device) -> FlatBatch:
    """The documents of `batch` end to end, row by row."""
    real = batch.segments > 0
    trained = batch.loss_mask[real]

    def moved(array: IntArray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return FlatBatch(
        tokens=moved(batch.inputs[real])[None],
        positions=moved(batch.positions[real])[None],
        documents=Documents(_document_lengths(batch.segments)),
        rows=moved(np.flatnonzero(trained).astype(np.int32)),
        targets=moved(batch.targets[real][trained]),
    )


def _document_lengths(segments: IntArray) -> tuple[int, ...]:
    """Lengths of the runs of equal segment numbers within each row, padding left out."""
    rows = np.arange(len(segments))[:, None] * (int(segments.max(initial=0)) + 1)
    numbers = (segments + rows)[segments > 0]
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return tuple(int(length) for length in np.diff(starts, append=len(numbers)))

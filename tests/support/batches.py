"""Batches for engine tests: rows of random tokens, as one padded batch or as several."""

from collections.abc import Sequence

import numpy as np

from finetune.core.types import Batch, IntArray

FIRST_TOKEN = 3  # after the special tokens


def random_rows(count: int, *, vocabulary: int, lengths: tuple[int, int] = (5, 20), seed: int = 0) -> list[IntArray]:
    """Rows of different lengths (of inputs; each has one token more, its last target)."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(*lengths, size=count, endpoint=True)
    return [rng.integers(FIRST_TOKEN, vocabulary, size=size + 1).astype(np.int32) for size in sizes]


def batch_of(rows: Sequence[IntArray], *, width: int | None = None, prompt: int = 0, pad: int = 0) -> Batch:
    """Rows padded on the right to the longest, or to `width`; the first `prompt` targets are not trained on."""
    length = max(len(row) - 1 for row in rows) if width is None else width
    shape = (len(rows), length)
    inputs, targets = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    mask, segments = np.zeros(shape, np.bool_), np.zeros(shape, np.int32)
    for index, row in enumerate(rows):
        size = len(row) - 1
        inputs[index, :size], targets[index, :size] = row[:-1], row[1:]
        mask[index, prompt:size] = True
        segments[index, :size] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    return Batch(inputs, targets, mask, positions, segments)


def packed_batch(packs: Sequence[Sequence[IntArray]], *, prompt: int = 0, width: int | None = None) -> Batch:
    """One row for each pack: its documents end to end, then padding to the longest pack or to `width`."""
    length = width or max(sum(len(row) - 1 for row in pack) for pack in packs)
    shape = (len(packs), length)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask, segments, positions = np.zeros(shape, np.bool_), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for index, pack in enumerate(packs):
        start = 0
        for number, row in enumerate(pack, start=1):
            end = start + len(row) - 1
            inputs[index, start:end], targets[index, start:end] = row[:-1], row[1:]
            mask[index, start + prompt : end] = True
            segments[index, start:end] = number
            positions[index, start:end] = np.arange(end - start)
            start = end
    return Batch(inputs, targets, mask, positions, segments)

"""Whether the rows of a model can be decoded in one pass: tried once, on a few tokens."""

import mlx.core as mx

from finetune.engines.mlx import compat
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.ragged import LayerCache, RowLengths


def rows_can_share(base: BaseModel) -> bool:
    """Whether two rows of different lengths in one pass get the logits that each gets alone."""
    prompts, newest = ([0, 1, 2], [3]), [4, 5]
    try:
        rows = RowLengths([])
        layers = [LayerCache(rows, window) for window in compat.cache_windows(base.model)]
        for prompt in prompts:
            _read_and_join(base, prompt, layers, rows)
        found = base.split.logits(base.split.body(mx.array(newest)[:, None], cache=layers)[:, -1])
        wholes = [mx.array([[*prompt, token]]) for prompt, token in zip(prompts, newest, strict=True)]
        expected = mx.concatenate([base.split.logits(base.split.body(whole)[:, -1]) for whole in wholes])
        tolerance = max(1e-3, 4 * mx.finfo(expected.dtype).eps) * mx.abs(expected).max()
        return bool((mx.abs(found - expected).max() < tolerance).item())
    except (ValueError, TypeError, AttributeError, IndexError):  # a cache of another kind, or one that is looked into
        return False


def _read_and_join(base: BaseModel, prompt: list[int], layers: list[LayerCache], rows: RowLengths) -> None:
    lengths = RowLengths([0])
    row = [LayerCache(lengths, layer.window) for layer in layers]
    base.split.body(mx.array([prompt]), cache=row)
    lengths.advance(len(prompt))
    for mine, theirs in zip(layers, row, strict=True):
        mine.join(theirs)
    rows.join(len(prompt))

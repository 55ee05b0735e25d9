"""Loss and log-probabilities of a batch with the weights that a model holds; nothing changes."""

from typing import Any

import mlx.core as mx
import numpy as np

from finetune.core.types import Batch, FloatArray, LossSum
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.loss import Positions, evaluate_rows, gather


def positions_of(batch: Batch) -> Positions:
    """Where the batch is trained on, as device arrays. Refuses packed rows, which this engine would mix up."""
    if batch.segments.max(initial=0) > 1:
        raise ValueError("the MLX engine takes one document a row")
    rows = np.flatnonzero(batch.loss_mask)
    return Positions(mx.array(rows.astype(np.int32)), mx.array(batch.targets.reshape(-1)[rows]))


def batch_loss(base: BaseModel, batch: Batch) -> LossSum:
    """Summed loss in nats, trained tokens, and correct predictions."""
    if not batch.trained_tokens:
        return LossSum(0.0, 0, 0)
    with explained_memory():
        losses, hits = _evaluate(base, batch)
        total: Any = losses.sum()
        correct: Any = hits.sum()
        mx.eval(total, correct)
    return LossSum(float(total.item()), batch.trained_tokens, int(correct.item()))


def batch_logprobs(base: BaseModel, batch: Batch) -> FloatArray:
    """log p(target) [B, T], 0 where nothing is trained on."""
    result = np.zeros(batch.targets.shape, np.float32)
    if batch.trained_tokens:
        with explained_memory():
            losses, _ = _evaluate(base, batch)
            result[batch.loss_mask] = -np.array(losses)
    return result


def batch_distributions(base: BaseModel, batch: Batch) -> FloatArray:
    """log p of the whole vocabulary at each trained position, [N, V]."""
    with explained_memory():
        hidden = gather(base.split.body(mx.array(batch.inputs)), positions_of(batch))
        logits = base.split.logits(hidden).astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _evaluate(base: BaseModel, batch: Batch) -> tuple[mx.array, mx.array]:
    positions = positions_of(batch)
    hidden = gather(base.split.body(mx.array(batch.inputs)), positions)
    return evaluate_rows(base.split.head, hidden, positions.targets, base.vocabulary)

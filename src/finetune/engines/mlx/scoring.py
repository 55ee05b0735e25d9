"""Loss and log-probabilities of a batch with the weights that a model holds; nothing changes."""

from typing import Any

import mlx.core as mx
import numpy as np

from finetune.core.types import Batch, FloatArray, LossSum
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.documents import Arranged, arrange
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.loss import evaluate_rows, gather


def batch_loss(base: BaseModel, batch: Batch) -> LossSum:
    """Summed loss in nats, trained tokens, and correct predictions."""
    if not batch.trained_tokens:
        return LossSum(0.0, 0, 0)
    with explained_memory():
        parts = [_evaluate(base, part) for part in calls_of(base, batch)]
        total: Any = sum(losses.sum() for losses, _ in parts)
        correct: Any = sum(hits.sum() for _, hits in parts)
        mx.eval(total, correct)
    return LossSum(float(total.item()), batch.trained_tokens, int(correct.item()))


def batch_logprobs(base: BaseModel, batch: Batch) -> FloatArray:
    """log p(target) [B, T], 0 where nothing is trained on."""
    result = np.zeros(batch.targets.shape, np.float32)
    if batch.trained_tokens:
        with explained_memory():
            for part in calls_of(base, batch):
                losses, _ = _evaluate(base, part)
                result.reshape(-1)[part.places] = -np.array(losses)
    return result


def batch_distributions(base: BaseModel, batch: Batch) -> FloatArray:
    """log p of the whole vocabulary at each trained position, [N, V]."""
    result = np.zeros((batch.trained_tokens, base.vocabulary), np.float32)
    places = np.flatnonzero(batch.loss_mask)
    with explained_memory():
        for part in calls_of(base, batch):
            hidden = gather(base.split.body(part.inputs, cache=part.cache), part.positions)
            logits = base.split.logits(hidden).astype(mx.float32)
            result[np.searchsorted(places, part.places)] = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return result


def calls_of(base: BaseModel, batch: Batch) -> list[Arranged]:
    """The calls of the model that compute a batch."""
    return arrange(batch, layers=base.split.layers, takes_documents=base.split.takes_documents)


def _evaluate(base: BaseModel, part: Arranged) -> tuple[mx.array, mx.array]:
    hidden = gather(base.split.body(part.inputs, cache=part.cache), part.positions)
    return evaluate_rows(base.split.head, hidden, part.positions.targets, base.vocabulary)

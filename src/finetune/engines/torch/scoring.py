"""Loss and log-probabilities of a batch with the weights that a model holds; nothing changes."""

import numpy as np
import torch
from torch import Tensor

from finetune.core.types import Batch, FloatArray, LossSum
from finetune.engines.torch.device import explained_memory
from finetune.engines.torch.documents import FlatBatch, flatten
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.loss import evaluate_rows


@torch.inference_mode()
def batch_loss(base: BaseModel, batch: Batch) -> LossSum:
    """Summed loss in nats, trained tokens, and correct predictions."""
    if not batch.trained_tokens:
        return LossSum(0.0, 0, 0)
    with explained_memory():
        losses, hits = _evaluate(base, batch)
        return LossSum(float(losses.sum()), batch.trained_tokens, int(hits.sum()))


@torch.inference_mode()
def batch_logprobs(base: BaseModel, batch: Batch) -> FloatArray:
    """log p(target) [B, T], 0 where nothing is trained on."""
    result = np.zeros(batch.targets.shape, np.float32)
    if batch.trained_tokens:
        with explained_memory():
            losses, _ = _evaluate(base, batch)
            result[batch.loss_mask] = -losses.cpu().numpy()
    return result


@torch.inference_mode()
def batch_distributions(base: BaseModel, batch: Batch) -> FloatArray:
    """log p of the whole vocabulary at each trained position, [N, V]."""
    with explained_memory():
        logits = base.split.logits(_hidden(base, flatten(batch, base.device))).float()
        result: FloatArray = torch.log_softmax(logits, dim=-1).cpu().numpy()
        return result


def _evaluate(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    flat = flatten(batch, base.device)
    return evaluate_rows(base.split.head, _hidden(base, flat), flat.targets)


def _hidden(base: BaseModel, flat: FlatBatch) -> Tensor:
    """Hidden states [n, D] at the trained positions."""
    return base.split.body(flat).index_select(0, flat.rows)

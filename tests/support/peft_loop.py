"""The reference for training: a transformers model, PEFT's layers, torch's AdamW and a loop of a dozen lines.

It shares nothing with the engines but the batches and the initial A: documents are cut out of their batches and
padded together (a causal model never sees what is to its right), and the loss is torch's cross-entropy over all logits.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from finetune.adapters.lora import AdapterInit, seeded_init
from finetune.config.schema import LoraConfig, TrainingConfig
from finetune.core.types import Batch

_A = ".lora_A.default.weight"
_PREFIX = "base_model.model."
_IGNORED = -100  # the target that cross_entropy leaves out


def load(path: Path) -> Any:
    """transformers' own model in float32, deterministic."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def with_peft(
    model: Any, lora: LoraConfig, *, init: AdapterInit | None = None, use_dora: bool = False, **peft: Any
) -> Any:
    """PEFT's adapters around `model` as `lora` asks for them, starting from the A that the engines start from."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    layers = {type(module).__name__ for module in model.modules()}
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.effective_alpha,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        rank_pattern=dict(lora.rank_pattern),
        use_dora=use_dora,
        fan_in_fan_out="Conv1D" in layers,
        task_type="CAUSAL_LM",
        **peft,
    )
    adapted = get_peft_model(model, config).eval()  # evaluation mode: no dropout
    draw = init or seeded_init(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(_A):
                module = name.removeprefix(_PREFIX).removesuffix(_A)
                parameter.copy_(torch.from_numpy(draw(module, *parameter.shape)))
    return adapted


def train(
    model: Any, steps: Sequence[Sequence[Batch]], training: TrainingConfig, *, rates: Sequence[float]
) -> list[float]:
    """AdamW on whatever requires a gradient; the loss of each step before its update, in nats a trained token."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(trained, betas=betas, eps=training.epsilon, weight_decay=training.weight_decay)
    losses = []
    for micro_batches, rate in zip(steps, rates, strict=True):
        tokens = sum(batch.trained_tokens for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            loss = summed_loss(model, batch) / tokens
            loss.backward()
            total += loss.item()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats over the trained tokens of all documents."""
    inputs, targets = _documents(batch)
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=_IGNORED)


@torch.no_grad()
def distributions(model: Any, batch: Batch) -> np.ndarray:
    """log p of the whole vocabulary as `InferenceSession.logprobs` gives it, [N, V]: each document by itself."""
    parts = []
    for row, where in _places(batch):
        logits = model(input_ids=torch.tensor(batch.inputs[row, where][None]).long(), use_cache=False).logits
        parts.append(torch.log_softmax(logits[0].float(), -1).numpy()[batch.loss_mask[row, where]])
    return np.concatenate(parts)


def logprobs(model: Any, batch: Batch) -> np.ndarray:
    """log p(target) as `InferenceSession.token_logprobs` gives it, [B, T]; 0 where nothing is trained on."""
    result = np.zeros(batch.targets.shape, np.float32)
    targets = batch.targets[batch.loss_mask]
    result[batch.loss_mask] = distributions(model, batch)[np.arange(len(targets)), targets]
    return result


def _documents(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of every document as a row of its own, padded on the right."""
    places = list(_places(batch))
    width = max(len(where) for _, where in places)
    inputs = torch.zeros(len(places), width, dtype=torch.long)
    targets = torch.full((len(places), width), _IGNORED)
    for number, (row, where) in enumerate(places):
        inputs[number, : len(where)] = torch.from_numpy(batch.inputs[row, where])
        goals = np.where(batch.loss_mask[row, where], batch.targets[row, where], _IGNORED)
        targets[number, : len(where)] = torch.from_numpy(goals)
    return inputs, targets


def _places(batch: Batch) -> Iterator[tuple[int, np.ndarray]]:
    """(row, its columns) of every document."""
    for row, segments in enumerate(batch.segments):
        for segment in np.unique(segments[segments > 0]):
            yield row, np.flatnonzero(segments == segment)

"""Cross-entropy over a large vocabulary without the [tokens, vocabulary] matrix.

Only trained positions reach the head, a chunk of rows at a time. The gradient with respect to the hidden states
(and the head's weights where they are trained) is computed in the same pass, while a chunk's logits are at hand:
for one row, with p = softmax(logits), target t, smoothing e and vocabulary V,

    loss = logsumexp(logits) - (1 - e) logits[t] - e mean(logits)
    d loss / d logits = p - (1 - e) onehot(t) - e / V

which is torch's cross_entropy(label_smoothing=e). Reductions are in float32 whatever the type of the logits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.engines.torch.head import Head

# Logits at once: 28 MB in float32, a few times that with their gradient. Blocks of 32 MB and more go back to the
# system each time they are freed (glibc), and clearing their pages anew costs a fifth of the loss.
CHUNK_ELEMENTS = 7 << 20
_FEWEST_ROWS = 64  # fewer rows make slow matrix products


def chunk_rows(vocabulary: int) -> int:
    """Rows of hidden states that go through the head together."""
    return max(_FEWEST_ROWS, CHUNK_ELEMENTS // vocabulary // 16 * 16)


def target_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss in nats, whether the most probable token is the target) of each row, without smoothing."""
    values = logits.float()
    picked = values.gather(1, targets[:, None])[:, 0]
    return values.logsumexp(dim=-1) - picked, values.argmax(dim=-1) == targets


@torch.no_grad()
def evaluate_rows(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`target_losses` of all rows of `hidden` [n, D], chunk by chunk."""
    parts = [target_losses(head.finish(head.project(rows)), goals) for rows, goals in _chunks(head, hidden, targets)]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def summed_loss(head: Head, hidden: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss in nats, summed over the rows of `hidden` [n, D]: a float32 scalar with a gradient."""
    result: Tensor = _SummedLoss.apply(head, smoothing, targets, hidden, *head.parameters())  # type: ignore[no-untyped-call]
    return result


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients along with the loss, and only scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, head: Head, smoothing: float, targets: Tensor, hidden: Tensor, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        into_hidden: list[Tensor] = []
        sums: list[Tensor] = []
        for rows, goals in _chunks(head, hidden, targets):
            loss, gradients = _chunk(head, smoothing, rows, goals, parameters)
            total += loss
            into_hidden.append(gradients[0])
            sums = [a.add_(b) for a, b in zip(sums, gradients[1:], strict=True)] if sums else gradients[1:]
        ctx.save_for_backward(torch.cat(into_hidden), *sums)
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(gradient * cotangent.to(gradient.dtype) for gradient in ctx.saved_tensors))


def _chunk(
    head: Head, smoothing: float, hidden: Tensor, targets: Tensor, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor]]:
    """(summed loss, its gradients with respect to the hidden rows and each trained parameter)."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = head.finish(head.project(hidden))
    loss, gradient = _loss_and_gradient(logits.detach(), targets, smoothing)
    return loss, list(torch.autograd.grad(logits, [hidden, *parameters], gradient))


def _loss_and_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(summed loss in float32, its gradient in the type of the logits, which it overwrites).

    logsumexp is found from the largest logit and its probability, which is never rounded to zero. One float32
    matrix serves all steps: a second one costs more than computing it.
    """
    column = targets[:, None]
    losses = logits.amax(dim=-1, keepdim=True).float() - (1.0 - smoothing) * logits.gather(1, column).float()
    if smoothing:
        losses -= smoothing * logits.mean(dim=-1, keepdim=True, dtype=torch.float32)
    probabilities = logits.to(torch.float32, copy=True)
    torch.softmax(probabilities, dim=-1, out=probabilities)
    losses -= probabilities.amax(dim=-1, keepdim=True).log_()
    if smoothing:
        probabilities -= smoothing / logits.shape[-1]
    probabilities.scatter_add_(1, column, torch.full_like(losses, smoothing - 1.0))
    return losses.sum(), logits.copy_(probabilities)


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    weight = getattr(head.module, "weight", None)
    size = chunk_rows(hidden.shape[-1] if weight is None else weight.shape[0])
    return zip(torch.split(hidden, size), torch.split(targets, size), strict=True)

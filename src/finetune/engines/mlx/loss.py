"""Cross-entropy over a large vocabulary without the [tokens, vocabulary] matrix.

Only trained positions reach the head, a chunk of rows at a time. The gradient with respect to the hidden states
(and the head's weights where they are trained) is computed in the same pass, while a chunk's logits are at hand:
for one row, with p = softmax(logits), target t, smoothing e and vocabulary V,

    loss = logsumexp(logits) - (1 - e) logits[t] - e mean(logits)
    d loss / d logits = p - (1 - e) onehot(t) - e / V

which is torch's cross_entropy(label_smoothing=e). Reductions are in float32 whatever the type of the logits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from finetune.engines.mlx.documents import Positions
from finetune.engines.mlx.exponential import exp
from finetune.engines.mlx.head import Head
from finetune.engines.mlx.untraced import untraced

CHUNK_ELEMENTS = 1 << 22  # logits at once: 16 MB in float32, a few times that with their gradient
_FEWEST_ROWS = 64  # fewer rows make slow matrix products


def gather(hidden: Any, positions: Positions) -> Any:
    """Hidden states [B, T, D] at the trained positions: [N, D]."""
    return hidden.reshape(-1, hidden.shape[-1])[positions.rows]


def chunk_rows(vocabulary: int) -> int:
    """Rows of hidden states that go through the head together."""
    return max(_FEWEST_ROWS, CHUNK_ELEMENTS // vocabulary)


def target_losses(logits: Any, targets: Any) -> tuple[Any, Any]:
    """(loss in nats, whether the most probable token is the target) of each row, without smoothing."""
    values = logits.astype(mx.float32)
    picked = mx.take_along_axis(values, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(values, axis=-1) - picked, mx.argmax(values, axis=-1) == targets


def evaluate_rows(head: Head, hidden: Any, targets: Any, vocabulary: int) -> tuple[Any, Any]:
    """`target_losses` of all rows of `hidden` [N, D], chunk by chunk."""
    losses, hits = [], []
    previous: list[Any] = []
    for start, end in _chunks(hidden.shape[0], vocabulary):
        rows = _after(hidden[start:end], previous)
        loss, hit = target_losses(head.finish(head.project(rows)), targets[start:end])
        previous = [loss, hit]
        losses.append(loss)
        hits.append(hit)
    return mx.concatenate(losses), mx.concatenate(hits)


def summed_loss(head: Head, vocabulary: int, smoothing: float) -> Callable[..., Any]:
    """A differentiable (hidden [N, D], targets [N], *head parameters) -> loss in nats, summed over the rows."""

    @mx.custom_function
    @untraced
    def forward(hidden: Any, targets: Any, *parameters: Any) -> tuple[Any, ...]:
        loss: Any = mx.array(0.0)
        hidden_gradients: list[Any] = []
        sums: list[Any] = []
        previous: list[Any] = []
        for start, end in _chunks(hidden.shape[0], vocabulary):
            rows = _after(hidden[start:end], previous)
            part, gradients = _chunk(head, smoothing, rows, targets[start:end], parameters)
            loss = loss + part
            hidden_gradients.append(gradients[0])
            sums = [a + b for a, b in zip(sums, gradients[1:], strict=True)] if sums else gradients[1:]
            previous = [part, gradients[0], *sums]
        return (loss, mx.concatenate(hidden_gradients), *sums)

    @forward.vjp
    def backward(primals: Sequence[Any], cotangents: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
        hidden, targets, *_ = primals
        gradients = [(cotangents[0] * gradient).astype(gradient.dtype) for gradient in outputs[1:]]
        return (gradients[0].astype(hidden.dtype), mx.zeros_like(targets), *gradients[1:])

    def function(hidden: Any, targets: Any, *parameters: Any) -> Any:
        outputs: Any = forward(hidden, targets, *parameters)
        return outputs[0]

    return function


def _chunk(
    head: Head, smoothing: float, hidden: Any, targets: Any, parameters: tuple[Any, ...]
) -> tuple[Any, list[Any]]:
    """(summed loss, its gradients with respect to the hidden rows and each head parameter)."""
    raw = head.project(hidden, *parameters)
    logits = head.finish(raw).astype(mx.float32)
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = exp(logits - largest)  # the only exp: it serves the loss and its gradient
    total = exponentials.sum(axis=-1, keepdims=True)
    column = targets[:, None]
    losses = mx.log(total) + largest - (1.0 - smoothing) * mx.take_along_axis(logits, column, axis=-1)
    gradient = exponentials / total
    if smoothing:
        losses = losses - smoothing * logits.mean(axis=-1, keepdims=True)
        gradient = gradient - smoothing / logits.shape[-1]
    at_target = mx.take_along_axis(gradient, column, axis=-1) - (1.0 - smoothing)
    gradient = mx.put_along_axis(gradient, column, at_target, axis=-1).astype(raw.dtype)
    _, [gradient] = mx.vjp(head.finish, [raw], [gradient])
    _, gradients = mx.vjp(head.project, [hidden, *parameters], [gradient])
    return losses.sum(), list(gradients)


def _chunks(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    size = chunk_rows(vocabulary)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _after(rows: Any, previous: Sequence[Any]) -> Any:
    """Hold a chunk back until the one before it is done: else the device may keep the logits of all chunks."""
    return mx.depends([rows], list(previous))[0] if previous else rows

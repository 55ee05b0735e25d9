"""The PyTorch engine's chunked loss against torch's cross-entropy on the whole matrix, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.engines.torch import loss as loss_module
from finetune.engines.torch.head import Head
from finetune.engines.torch.loss import evaluate_rows, summed_loss

ROWS, WIDTH, VOCABULARY = 37, 12, 50


@pytest.fixture(params=[8, 64], ids=["many chunks", "one chunk"])
def _chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocabulary: request.param)


def parts(cap: float | None, scale: float = 1.0) -> tuple[Head, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(WIDTH, VOCABULARY, bias=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    hidden = (scale * torch.randn(ROWS, WIDTH, generator=generator)).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return (
        Head("head", module, (lambda raw: torch.tanh(raw / cap) * cap) if cap else (lambda raw: raw)),
        hidden,
        targets,
    )


@pytest.mark.usefixtures("_chunk_rows")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_loss_and_gradients_are_those_of_torch(smoothing: float, cap: float | None, trained_head: bool) -> None:
    head, hidden, targets = parts(cap)
    head.module.requires_grad_(trained_head)
    expected = nn.functional.cross_entropy(
        head.finish(head.project(hidden)), targets, reduction="sum", label_smoothing=smoothing
    )
    found = summed_loss(head, hidden, targets, smoothing)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # float32
    trained = [hidden, *head.parameters()]
    pairs = zip(torch.autograd.grad(3.0 * found, trained), torch.autograd.grad(3.0 * expected, trained), strict=True)
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=2e-6 * float(theirs.abs().max()))


def test_logits_whose_probability_is_zero_in_float32_have_a_finite_loss() -> None:
    head, hidden, targets = parts(None, scale=100.0)
    expected = nn.functional.cross_entropy(head.project(hidden), targets, reduction="sum")
    found = summed_loss(head, hidden, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected > 100 * ROWS  # so the targets' probabilities are about exp(-100)


@torch.no_grad()
def test_rows_are_judged_like_the_whole_matrix() -> None:
    head, hidden, targets = parts(3.0)
    logits = head.finish(head.project(hidden))
    losses, hits = evaluate_rows(head, hidden, targets)
    assert torch.allclose(losses, nn.functional.cross_entropy(logits, targets, reduction="none"), atol=1e-6)
    assert torch.equal(hits, logits.argmax(dim=-1) == targets)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocabulary: 8)
    head, hidden, targets = parts(None)
    head.module.requires_grad_(False)
    with _Largest() as largest:
        summed_loss(head, hidden, targets).backward()
    assert largest.elements == max(8 * VOCABULARY, ROWS * WIDTH, VOCABULARY * WIDTH)

"""The chunked loss of both engines against torch's cross-entropy on the whole matrix, values and gradients."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import torch

from finetune.engines.mlx import head as mlx_head
from finetune.engines.mlx import loss as mlx_loss
from finetune.engines.torch import head as torch_head
from finetune.engines.torch import loss as torch_loss

ROWS, WIDTH, VOCABULARY = 37, 12, 50


class Case(NamedTuple):
    """A head without bias, and the rows that go through it."""

    hidden: np.ndarray  # [N, D]
    weight: np.ndarray  # [V, D]
    targets: np.ndarray  # [N]
    cap: float | None = None


class Computed(NamedTuple):
    """A summed loss with its gradients; the head's is None where it is frozen."""

    loss: float
    into_hidden: np.ndarray
    into_weight: np.ndarray | None


class MLXLoss:
    def compute(self, case: Case, *, smoothing: float = 0.0, trained_head: bool = False) -> Computed:
        function = mlx_loss.summed_loss(self._head(case), len(case.weight), smoothing)
        parameters = [mx.array(case.weight)] if trained_head else []

        def total(hidden: mx.array, *parameters: mx.array) -> mx.array:
            return function(hidden, mx.array(case.targets), *parameters)

        value, found = mx.value_and_grad(total, argnums=[0, 1] if trained_head else 0)(
            mx.array(case.hidden), *parameters
        )
        arrays = [np.array(gradient) for gradient in (found if trained_head else [found])]
        return Computed(value.item(), arrays[0], arrays[1] if trained_head else None)

    def rows(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        hidden, targets = mx.array(case.hidden), mx.array(case.targets)
        losses, hits = mlx_loss.evaluate_rows(self._head(case), hidden, targets, len(case.weight))
        return np.array(losses), np.array(hits)

    def _head(self, case: Case) -> mlx_head.Head:
        held, cap = mx.array(case.weight), case.cap

        def project(hidden: mx.array, *parameters: mx.array) -> mx.array:
            return hidden @ (parameters[0] if parameters else held).T

        finish = (lambda raw: mx.tanh(raw / cap) * cap) if cap else (lambda raw: raw)
        return mlx_head.Head("head", project, finish, ("weight",))


class TorchLoss:
    def compute(self, case: Case, *, smoothing: float = 0.0, trained_head: bool = False) -> Computed:
        head = self._head(case)
        head.module.requires_grad_(trained_head)
        hidden = torch.tensor(case.hidden, requires_grad=True)
        loss = torch_loss.summed_loss(head, hidden, torch.tensor(case.targets).long(), smoothing)
        loss.backward()
        return Computed(loss.item(), hidden.grad.numpy(), head.module.weight.grad.numpy() if trained_head else None)

    def rows(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        hidden, targets = torch.tensor(case.hidden), torch.tensor(case.targets).long()
        losses, hits = torch_loss.evaluate_rows(self._head(case), hidden, targets)
        return losses.numpy(), hits.numpy()

    def _head(self, case: Case) -> torch_head.Head:
        module, cap = torch.nn.Linear(WIDTH, len(case.weight), bias=False), case.cap
        module.weight.data = torch.tensor(case.weight)
        return torch_head.Head("head", module, (lambda raw: torch.tanh(raw / cap) * cap) if cap else (lambda raw: raw))


@pytest.fixture(params=[MLXLoss, TorchLoss], ids=["mlx", "pytorch"])
def ours(request: pytest.FixtureRequest) -> MLXLoss | TorchLoss:
    return request.param()


@pytest.fixture(params=[8, 64], ids=["many chunks", "one chunk"])
def _chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mlx_loss, torch_loss):
        monkeypatch.setattr(module, "chunk_rows", lambda vocabulary: request.param)


def a_case(*, scale: float = 1.0, cap: float | None = None) -> Case:
    rng = np.random.default_rng(0)
    hidden = (scale * rng.normal(size=(ROWS, WIDTH))).astype(np.float32)
    weight = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    return Case(hidden, weight, rng.integers(0, VOCABULARY, size=ROWS).astype(np.int32), cap)


@pytest.mark.usefixtures("_chunk_rows")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_loss_and_gradients_are_those_of_cross_entropy(
    ours: MLXLoss | TorchLoss, smoothing: float, cap: float | None, trained_head: bool
) -> None:
    case = a_case(cap=cap)
    found = ours.compute(case, smoothing=smoothing, trained_head=trained_head)
    hidden, weight = (torch.tensor(array, requires_grad=True) for array in (case.hidden, case.weight))
    logits = hidden @ weight.T
    logits = torch.tanh(logits / cap) * cap if cap else logits
    targets = torch.tensor(case.targets, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)
    for gradient, theirs in ((found.into_hidden, hidden.grad), (found.into_weight, weight.grad)):
        if gradient is not None:
            atol = 2e-6 * float(theirs.abs().max()) + 1e-6  # a few roundings of float32
            np.testing.assert_allclose(gradient, theirs.numpy(), rtol=0, atol=atol)


def test_huge_logits_stay_finite(ours: MLXLoss | TorchLoss) -> None:
    found = ours.compute(a_case(scale=1e4))
    assert np.isfinite(found.loss)
    assert np.isfinite(found.into_hidden).all()


@pytest.mark.usefixtures("_chunk_rows")
def test_evaluation_is_the_same_loss_row_by_row(ours: MLXLoss | TorchLoss) -> None:
    case = a_case()
    losses, hits = ours.rows(case)
    logits = torch.tensor(case.hidden @ case.weight.T)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(case.targets).long(), reduction="none")
    np.testing.assert_allclose(losses, expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(hits, logits.argmax(-1).numpy() == case.targets)


def test_the_gradient_agrees_with_finite_differences_in_float64(ours: MLXLoss | TorchLoss) -> None:
    """Central differences of the float32 gradient against a float64 loss by NumPy: 1e-5 is float32's rounding."""
    case = a_case()
    gradient = ours.compute(case, smoothing=0.1).into_hidden

    def loss(rows: np.ndarray) -> float:
        logits = rows @ case.weight.astype(np.float64).T
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = log_p[np.arange(ROWS), case.targets]
        return float(-(0.9 * picked + 0.1 * log_p.mean(-1)).sum())

    for entry in [(0, 0), (17, 5), (36, 11)]:
        shift = np.zeros((ROWS, WIDTH))
        shift[entry] = 1e-6
        measured = (loss(case.hidden + shift) - loss(case.hidden - shift)) / 2e-6
        assert float(gradient[entry]) == pytest.approx(measured, abs=1e-5)


def test_the_whole_matrix_is_never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of logits in chunks of 1 MB: a chunk, its gradient, and what the device holds while it runs ahead."""
    rows, vocabulary = 16384, 1024
    monkeypatch.setattr(mlx_loss, "CHUNK_ELEMENTS", 1 << 18)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    weight = rng.normal(size=(vocabulary, WIDTH)).astype(np.float32)
    case = Case(hidden, weight, np.zeros(rows, np.int32))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    MLXLoss().compute(case)
    assert mx.get_peak_memory() - before < 32e6


def test_pytorch_never_holds_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product gives more logits than a chunk has."""
    monkeypatch.setattr(torch_loss, "CHUNK_ELEMENTS", 1 << 12)
    case = a_case()
    many = Case(np.tile(case.hidden, (20, 1)), case.weight, np.tile(case.targets, 20))
    widest: list[int] = []
    project = torch_head.Head.project

    def watched(head: torch_head.Head, hidden: torch.Tensor) -> torch.Tensor:
        widest.append(len(hidden) * VOCABULARY)
        return project(head, hidden)

    monkeypatch.setattr(torch_head.Head, "project", watched)
    TorchLoss().compute(many)
    assert max(widest) <= 1 << 12
    assert sum(widest) == 20 * ROWS * VOCABULARY

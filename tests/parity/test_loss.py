"""The chunked loss against torch's cross-entropy on the whole matrix, values and gradients."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from finetune.engines.mlx import loss as loss_module
from finetune.engines.mlx.head import Head
from finetune.engines.mlx.loss import evaluate_rows, summed_loss

ROWS, WIDTH, VOCABULARY = 37, 12, 50


@pytest.fixture(params=[8, 64], ids=["many chunks", "one chunk"])
def _chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocabulary: request.param)


def arrays(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = (scale * rng.normal(size=(ROWS, WIDTH))).astype(np.float32)
    weight = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    return hidden, weight, rng.integers(0, VOCABULARY, size=ROWS).astype(np.int32)


def linear_head(weight: np.ndarray, cap: float | None) -> Head:
    held = mx.array(weight)

    def project(hidden: mx.array, *parameters: mx.array) -> mx.array:
        return hidden @ (parameters[0] if parameters else held).T

    return Head("head", project, (lambda raw: mx.tanh(raw / cap) * cap) if cap else (lambda raw: raw), ("weight",))


@pytest.mark.usefixtures("_chunk_rows")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])
def test_loss_and_gradients_are_those_of_torch(smoothing: float, cap: float | None, trained_head: bool) -> None:
    hidden, weight, targets = arrays()
    function = summed_loss(linear_head(weight, cap), VOCABULARY, smoothing)
    parameters = [mx.array(weight)] if trained_head else []

    def total(hidden: mx.array, *parameters: mx.array) -> mx.array:
        return function(hidden, mx.array(targets), *parameters)

    arguments = [0, 1] if trained_head else 0
    value, gradients = mx.value_and_grad(total, argnums=arguments)(mx.array(hidden), *parameters)
    torch_hidden, torch_weight = (torch.tensor(array, requires_grad=True) for array in (hidden, weight))
    logits = torch_hidden @ torch_weight.T
    logits = torch.tanh(logits / cap) * cap if cap else logits
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets, dtype=torch.long), reduction="sum", label_smoothing=smoothing
    )
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = gradients if trained_head else [gradients]
    for ours, theirs in zip(gradients, (torch_hidden.grad, torch_weight.grad), strict=False):
        np.testing.assert_allclose(np.array(ours), theirs.numpy(), atol=2e-6 * float(theirs.abs().max()) + 1e-6)


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = arrays(scale=1e4)
    function = summed_loss(linear_head(weight, None), VOCABULARY, 0.0)
    value, gradient = mx.value_and_grad(lambda rows: function(rows, mx.array(targets)))(mx.array(hidden))
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.usefixtures("_chunk_rows")
def test_evaluation_is_the_same_loss_row_by_row() -> None:
    hidden, weight, targets = arrays()
    head = linear_head(weight, None)
    losses, hits = evaluate_rows(head, mx.array(hidden), mx.array(targets), VOCABULARY)
    logits = torch.tensor(hidden @ weight.T)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets, dtype=torch.long), reduction="none")
    np.testing.assert_allclose(np.array(losses), expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(np.array(hits), logits.argmax(-1).numpy() == targets)


def test_the_gradient_agrees_with_finite_differences_in_float64() -> None:
    """Central differences of the float32 gradient against a float64 loss by NumPy: 1e-5 is float32's rounding."""
    hidden, weight, targets = arrays()
    function = summed_loss(linear_head(weight, None), VOCABULARY, 0.1)
    gradient = mx.grad(lambda rows: function(rows, mx.array(targets)))(mx.array(hidden))

    def loss(rows: np.ndarray) -> float:
        logits = rows @ weight.astype(np.float64).T
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = log_p[np.arange(ROWS), targets]
        return float(-(0.9 * picked + 0.1 * log_p.mean(-1)).sum())

    for entry in [(0, 0), (17, 5), (36, 11)]:
        shift = np.zeros((ROWS, WIDTH))
        shift[entry] = 1e-6
        measured = (loss(hidden + shift) - loss(hidden - shift)) / 2e-6
        assert float(np.array(gradient)[entry]) == pytest.approx(measured, abs=1e-5)


def test_the_whole_matrix_is_never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of logits in chunks of 1 MB: a chunk, its gradient, and what the device holds while it runs ahead."""
    rows, vocabulary = 16384, 1024
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 1 << 18)
    rng = np.random.default_rng(0)
    head = linear_head(rng.normal(size=(vocabulary, 16)).astype(np.float32), None)
    hidden, targets = mx.array(rng.normal(size=(rows, 16)).astype(np.float32)), mx.zeros(rows, mx.int32)
    function = summed_loss(head, vocabulary, 0.0)
    mx.eval(hidden, targets)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(lambda h: function(h, targets))(hidden))
    assert mx.get_peak_memory() - before < 32e6

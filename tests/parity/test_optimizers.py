"""Update rules of both engines against torch.optim on the same gradients."""

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
import torch

from finetune.config.schema import TrainingConfig
from finetune.engines.mlx import optimizer as mlx_optimizer
from finetune.engines.torch import optimizer as torch_optimizer
from finetune.engines.torch.masters import Masters

Optimized: TypeAlias = Callable[[TrainingConfig], np.ndarray]

RATES = [1e-2, 5e-3, 1e-2, 2e-3, 1e-3, 1e-2]


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [(10.0 ** rng.uniform(-4, 1) * rng.normal(size=(5, 7))).astype(np.float32) for _ in RATES]


def by_mlx(training: TrainingConfig) -> np.ndarray:
    optimizer = mlx_optimizer.Optimizer(training, lambda name, weight: True)
    weights = {"w": mx.array(start())}
    state = optimizer.initial_state(weights)
    for rate, gradient in zip(RATES, gradients(), strict=True):
        updated = optimizer.update(
            weights,
            {"w": mx.array(4.0 * gradient)},
            state,
            loss=mx.array(1.0),
            tokens=mx.array(4.0),
            learning_rate=mx.array(rate),
        )
        weights, state = updated.weights, updated.state
    return np.array(weights["w"])


def by_pytorch(training: TrainingConfig) -> np.ndarray:
    masters = Masters({"w": (5, 7)}, lambda name: True, torch.device("cpu"))
    masters.set({"w": torch.tensor(start())})
    optimizer = torch_optimizer.Optimizer(training, masters)
    for rate, gradient in zip(RATES, gradients(), strict=True):
        masters.gradients.copy_(torch.tensor(4.0 * gradient).flatten())
        optimizer.update(loss=torch.tensor(1.0), tokens=4, learning_rate=rate)
    return masters.views(masters.weights)["w"].numpy()


@pytest.fixture(params=[by_mlx, by_pytorch])
def ours(request: pytest.FixtureRequest) -> Optimized:
    return request.param


def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


def torchs(make: Any) -> np.ndarray:
    weight = torch.nn.Parameter(torch.tensor(start()))
    optimizer = make([weight])
    for rate, gradient in zip(RATES, gradients(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", lambda decay: lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)),
        ("adam", lambda decay: lambda p: torch.optim.Adam(p, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)),
        ("sgd", lambda decay: lambda p: torch.optim.SGD(p, momentum=0.8, weight_decay=decay)),
    ],
    ids=["adamw", "adam", "sgd"],
)
def test_trajectory_is_that_of_torch(ours: Optimized, name: Any, make: Any, decay: float) -> None:
    training = TrainingConfig(
        optimizer=name, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=decay, max_grad_norm=None
    )
    expected = torchs(make(decay))
    np.testing.assert_allclose(ours(training), expected, rtol=0, atol=2e-6)  # six steps of float32 rounding
    assert np.abs(expected - start()).max() > 1e-2


def test_adafactor_is_that_of_mlx(ours: Optimized) -> None:
    rule = mlx.optimizers.Adafactor(learning_rate=1e-2, relative_step=False, scale_parameter=False)
    weights = {"w": mx.array(start())}
    rule.init(weights)
    for rate, gradient in zip(RATES, gradients(), strict=True):
        rule.learning_rate = rate
        weights = rule.apply_gradients({"w": mx.array(gradient)}, weights)
    training = TrainingConfig(optimizer="adafactor", max_grad_norm=None)
    np.testing.assert_allclose(ours(training), np.array(weights["w"]), rtol=0, atol=1e-6)


def test_clipping_is_that_of_torch(ours: Optimized) -> None:
    def make(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, momentum=0.0)
        step = optimizer.step
        optimizer.step = lambda: (torch.nn.utils.clip_grad_norm_(parameters, 0.5), step())[1]
        return optimizer

    training = TrainingConfig(optimizer="sgd", beta1=0.0, max_grad_norm=0.5)
    np.testing.assert_allclose(ours(training), torchs(make), rtol=0, atol=1e-7)

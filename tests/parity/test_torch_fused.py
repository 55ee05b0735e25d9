"""Fused parts of the PyTorch engine give the results and gradients of the modules that they replace."""

from typing import Any

import pytest
import torch
from tests.support.tiny_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.engines.torch.fused import fuse

NORMED = [kind for kind in CONFIGS if kind != "gpt2"]  # the others have RMS norms


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.requires_grad_(False)


def logits_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text, and the gradient of some function of them with respect to its embeddings."""
    embedded = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
    return logits.detach(), gradient


@pytest.mark.parametrize("kind", NORMED)
def test_norms_keep_logits_and_gradients(kind: str) -> None:
    model = model_of(kind)
    logits, gradient = logits_and_gradient(model)
    fuse(model)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    assert all("forward" in vars(module) for module in norms)
    found, found_gradient = logits_and_gradient(model)
    assert torch.allclose(found, logits, atol=1e-5)  # float32, logits of a few units
    assert torch.allclose(found_gradient, gradient, atol=1e-5 * float(gradient.abs().max()))


def test_a_trained_norm_gets_its_gradient() -> None:
    model = model_of("llama").requires_grad_(True)
    fuse(model)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


class OtherRMSNorm(nn.Module):
    """Something else under a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight * 2


def test_a_module_that_computes_something_else_is_left_alone() -> None:
    module = OtherRMSNorm()
    fuse(module)
    assert "forward" not in vars(module)

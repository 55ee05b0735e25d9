"""The PyTorch engine's LoRA layer: gradients, what it keeps for the backward pass, and dropout."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetune.engines.torch.lora import LoRALinear, LoraSlot, LoraWeights

TOKENS, IN, OUT, RANK = 7, 6, 5, 2


def layer(kind: str, dtype: torch.dtype = torch.float64) -> tuple[LoRALinear, LoraWeights]:
    """A frozen layer with an update in its slot."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    nn.init.normal_(base.bias)
    weights = LoraWeights(
        torch.randn(RANK, IN, dtype=dtype).requires_grad_(), torch.randn(OUT, RANK, dtype=dtype).requires_grad_(), 1.5
    )
    return LoRALinear(base.to(dtype).requires_grad_(False), "it", LoraSlot({"it": weights})), weights


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_agree_with_finite_differences(kind: str, dropout: float) -> None:
    module, weights = layer(kind)
    module.slot.dropout, module.slot.seeds = dropout, {"it": 3}
    x = torch.randn(TOKENS, IN, dtype=torch.float64).requires_grad_()

    def output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        module.slot.active = {"it": LoraWeights(a, b, weights.scale)}
        return module(x)

    assert torch.autograd.gradcheck(output, (x, weights.a, weights.b))


def test_output_and_gradients_are_those_of_pefts_layer() -> None:
    module, weights = layer("linear", torch.float32)
    plain = nn.Sequential(nn.Linear(IN, OUT))
    plain[0].load_state_dict(module.base.state_dict())
    peft: Any = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"]))
    a, b = peft.base_model.model[0].lora_A["default"].weight, peft.base_model.model[0].lora_B["default"].weight
    with torch.no_grad():
        a.copy_(weights.a)
        b.copy_(weights.b)
    x = torch.randn(1, TOKENS, IN).requires_grad_()
    upstream = torch.randn(1, TOKENS, OUT)
    ours = torch.autograd.grad(module(x), (x, weights.a, weights.b), upstream)
    theirs = torch.autograd.grad(peft(x), (x, a, b), upstream)
    assert torch.allclose(module(x), peft(x), atol=1e-5)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)  # float32, values of some ten


def test_bfloat16_products_leave_the_adapter_in_float32() -> None:
    module, weights = layer("linear", torch.float32)
    module.base.to(torch.bfloat16)
    module.weight = LoRALinear(module.base, "it", module.slot).weight
    y = module(torch.randn(TOKENS, IN, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weights.a.grad is not None
    assert weights.a.grad.dtype == torch.float32


def test_only_the_input_the_low_rank_product_and_the_adapter_are_kept() -> None:
    module, _ = layer("linear")
    x = torch.randn(TOKENS, IN, dtype=torch.float64).requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        module(x)
    assert sorted(kept) == sorted([(TOKENS, IN), (TOKENS, RANK), (RANK, IN), (OUT, RANK)])


def test_dropout_draws_the_same_elements_again_and_keeps_the_mean() -> None:
    module, _ = layer("linear")
    module.slot.dropout, module.slot.seeds = 0.5, {"it": 3}
    x = torch.ones(TOKENS, IN, dtype=torch.float64)
    first = module(x)
    assert torch.equal(first, module(x))
    module.slot.seeds = {"it": 4}
    assert not torch.equal(first, module(x))
    outputs = []
    for seed in range(2000):
        module.slot.seeds = {"it": seed}
        outputs.append(module(x))
    module.slot.dropout = 0.0
    assert torch.allclose(torch.stack(outputs).mean(dim=0), module(x), atol=0.5)  # 0.1 standard errors of a few units

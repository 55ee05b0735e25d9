"""Weights in oneDNN's order: the module they come from is the reference."""

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny_models import CONFIGS, make_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finetune.config.schema import ModelConfig
from finetune.core.types import GenerationRequest
from finetune.engines.torch import compat, ordered
from finetune.engines.torch.engine import TorchEngine
from finetune.engines.torch.loading import BaseModel, load_base
from finetune.engines.torch.lora import linear_paths
from finetune.engines.torch.ordered import OrderedLinear, in_order, padded_rows
from finetune.engines.torch.trainable import count_parameters

pytestmark = pytest.mark.skipif(
    not compat.has_onednn(torch.float32), reason="PyTorch has no products with oneDNN's weights on this machine"
)
IN, OUT = 200, 136
TOKENS = torch.tensor([[3, 7, 11, 2, 9]])


def module_of(kind: str, dtype: torch.dtype) -> nn.Linear | Conv1D:
    torch.manual_seed(0)
    module = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=kind == "biased")
    if module.bias is not None:
        nn.init.normal_(module.bias)
    return module.to(dtype).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["linear", "biased", "conv1d"])
def test_a_product_is_the_modules_own(kind: str, dtype: torch.dtype) -> None:
    if not compat.has_onednn(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    module = module_of(kind, dtype)
    replacement = OrderedLinear(module)
    close = 1e-5 if dtype == torch.float32 else 2**-7  # a sum of 200 products, and its rounding to the type
    for rows in (1, 2, 15, 17, 33, 100):
        x = torch.randn(3, rows, IN).to(dtype)
        assert torch.allclose(replacement(x), module(x), rtol=close, atol=close), rows


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_weight_comes_back_bit_for_bit(kind: str) -> None:
    module = module_of(kind, torch.float32)
    dense = module.weight.T if kind == "conv1d" else module.weight
    assert torch.equal(OrderedLinear(module).dense(torch.float32), dense)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    replacement = OrderedLinear(module_of("biased", torch.float32))
    x = torch.randn(150, IN)
    alone = torch.cat([replacement(row[None]) for row in x])
    for rows in (2, 5, 16, 17, 40, 150):
        assert torch.equal(replacement(x[:rows]), alone[:rows]), rows


@given(st.integers(0, 100_000))
def test_few_numbers_of_rows_are_compiled_and_little_is_computed_for_nothing(rows: int) -> None:
    padded = padded_rows(rows)
    assert rows <= padded <= rows + rows // 8
    assert padded == rows if rows <= 16 else padded % (1 << (rows.bit_length() - 4)) == 0


def opened(directory: Path, kind: str) -> tuple[BaseModel, BaseModel]:
    """A model as it is loaded, and in order."""
    path = make_model(directory / kind, kind)
    config = ModelConfig(name=kind, dtype="float32", device="cpu")
    return load_base(path, config), in_order(load_base(path, config))


def logits_of(base: BaseModel) -> Tensor:
    with torch.inference_mode():
        return base.split.logits(base.split.hidden(input_ids=TOKENS, use_cache=False))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_says_the_same_and_takes_the_same_adapters(kind: str, tmp_path: Path) -> None:
    before, after = opened(tmp_path, kind)
    assert torch.allclose(logits_of(after), logits_of(before), rtol=1e-5, atol=1e-5)  # sums in another order
    assert linear_paths(after.model) == linear_paths(before.model)
    assert count_parameters(after.model) == count_parameters(before.model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_weight_lies_in_memory_twice_but_that_of_a_tied_head(kind: str, tmp_path: Path) -> None:
    _, after = opened(tmp_path, kind)
    gc.collect()
    head = after.model.get_output_embeddings()
    dense = [module for module in after.model.modules() if isinstance(module, nn.Linear | Conv1D)]
    assert all(module is head for module in dense)
    tied = isinstance(head, nn.Linear)
    assert not tied or head.weight is after.model.get_input_embeddings().weight
    assert isinstance(after.split.head.module, OrderedLinear)


def test_requests_are_answered_with_weights_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product, rows = compat.onednn_product, list[int]()

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(len(x))
        return product(x, weight, bias)

    monkeypatch.setattr(compat, "onednn_product", counted)
    config = ModelConfig(name="llama", dtype="float32", device="cpu")
    session = TorchEngine().open_inference(make_model(tmp_path / "llama"), model_config=config, adapters={})
    generator = session.generator()
    generator.add(GenerationRequest((5, 6, 7), 2))
    while generator.busy:
        generator.step()
    # Two layers of seven modules: the first tokens are read alone; behind the layers comes the head for each token.
    assert rows == [2] * 14 + [1] * 15 + [1] * 15


def test_a_tied_head_is_not_copied_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "free_memory", lambda device: 8)
    before, after = opened(tmp_path, "gemma")
    assert after.split.head.module is after.model.get_output_embeddings()
    assert torch.allclose(logits_of(after), logits_of(before), rtol=1e-5, atol=1e-5)

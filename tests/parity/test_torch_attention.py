"""The PyTorch engine's attention, by itself and inside transformers' models."""

from typing import Any

import pytest
import torch
from tests.support.tiny_models import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.engines.torch.attention import register
from finetune.engines.torch.blocks import Plan, Rule, attend_documents
from finetune.engines.torch.documents import Documents, FlatBatch
from finetune.engines.torch.head import split_model
from finetune.engines.torch.products import attend_masked

RULES = {
    "causal": Rule(0.3, None, None),
    "window": Rule(0.3, 50, None),
    "window of one": Rule(0.3, 1, None),
    "window longer than a block": Rule(0.3, 200, None),
    "soft cap": Rule(0.3, None, 2.0),
    "soft cap and window": Rule(0.3, 50, 2.0),
}
LENGTHS = (300, 1, 37, 45, 129, 128, 5)  # several blocks, groups of short ones, one token


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], rule: Rule) -> Tensor:
    """Attention with one explicit mask over all tokens, heads repeated."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    behind = place[:, None] - place
    seen = (behind >= 0) & (document[:, None] == document)
    if rule.window is not None:
        seen &= behind < rule.window
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, value)


def drawn(dtype: torch.dtype, heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    return [
        torch.randn(tokens, count, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_attention_and_its_gradients_are_those_of_an_explicit_mask(rule: Rule, heads: int, groups: int) -> None:
    inputs = drawn(torch.float64, heads, groups)
    found = attend_documents(*inputs, Plan(LENGTHS, rule))
    expected = reference(*inputs, LENGTHS, rule)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # keys' and values' gradients add up in float32
    assert torch.allclose(found, expected, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=2e-6)


def test_one_bfloat16_query_a_head_is_as_exact_as_its_inputs_where_keys_share_a_large_offset() -> None:
    """Decoding, rows of two lengths; the offset alone would round scores of some hundred to whole numbers."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 4, n, 16, generator=generator).bfloat16() for n in (1, 30, 30))
    key = key + (40.0 * torch.randn(1, 4, 1, 16, generator=generator)).bfloat16()
    mask = torch.arange(30) < torch.tensor([30, 17])[:, None, None, None]
    rule = Rule(0.3, None, None)
    expected = attend_masked(query.double(), key.double(), value.double(), mask, rule)
    found = attend_masked(query, key, value, mask, rule).double()
    assert (found - expected).abs().max() < 2e-2  # weights and values of up to 3 have 8 bits


def test_bfloat16_attention_is_as_exact_as_its_inputs_where_keys_share_a_large_offset() -> None:
    """Scores of some hundred, as Qwen2's key biases make them, would otherwise be rounded to whole numbers."""
    query, key, value = (part.detach() for part in drawn(torch.float64, 4, 2))
    key = key + 40.0 * torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = [part.to(torch.bfloat16) for part in (query, key, value)]
    rule = RULES["causal"]
    found = attend_documents(*low, Plan(LENGTHS, rule))
    exact = reference(*(part.double() for part in low), LENGTHS, rule)
    # bfloat16 has 8 bits: 2**-8 of values up to about 4, a few roundings one after the other
    assert (found.double() - exact).abs().max() < 0.1
    assert (found.double() - exact).abs().mean() < 0.005


WINDOWED = {"sliding_window": 8}
MODELS = {kind: (kind, {}) for kind in CONFIGS} | {
    "mistral-window": ("mistral", WINDOWED),
    "gemma2-window": ("gemma2", WINDOWED),
    "phi3-window": ("phi3", WINDOWED),
}


def pair(kind: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """The same random model with transformers' own attention and with ours."""
    models = []
    for implementation in ("eager", register()):
        torch.manual_seed(0)
        config = CONFIGS[kind]()
        config.update(changes)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval())
    return models[0], models[1]


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 270, (1, length), generator=generator) for length in lengths]


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_documents_end_to_end_get_the_logits_of_transformers_for_each_alone(kind: str, changes: dict[str, Any]) -> None:
    theirs, ours = pair(kind, changes)
    documents = texts(5, 17, 30, 1, 17)
    lengths = tuple(document.shape[1] for document in documents)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    split = split_model(ours)
    flat = FlatBatch(torch.cat(documents, dim=1), positions, Documents(lengths), positions[0], positions[0])
    found = split.logits(split.body(flat))
    expected = torch.cat([theirs(document).logits[0] for document in documents])
    assert split.head.path
    assert torch.allclose(found, expected, atol=1e-4)  # float32, logits of a few units


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_one_call(kind: str, changes: dict[str, Any]) -> None:
    theirs, ours = pair(kind, changes)
    (text,) = texts(30)
    cache, parts = None, []
    for start, end in ((0, 20), (20, 25), *((place, place + 1) for place in range(25, 30))):
        output = ours(text[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, dim=1), theirs(text).logits, atol=1e-4)


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_padding_that_a_mask_marks_is_not_seen(kind: str, changes: dict[str, Any]) -> None:
    theirs, ours = pair(kind, changes)
    short, long = texts(17, 23)
    tokens = torch.cat([torch.nn.functional.pad(short, (6, 0)), long])
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found, expected = (model(tokens, attention_mask=mask, position_ids=positions).logits for model in (ours, theirs))
    assert torch.allclose(found[0, 6:], expected[0, 6:], atol=1e-4)
    assert torch.allclose(found[1], expected[1], atol=1e-4)

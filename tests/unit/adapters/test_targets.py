"""Which modules get an adapter, and of which rank."""

import pytest

from finetune.adapters.targets import LinearShape, choose_ranks
from finetune.config.schema import LoraConfig
from finetune.core.errors import ConfigError

MODEL = {
    f"model.layers.{layer}.{name}": LinearShape(16, width)
    for layer in (0, 1, 10)
    for name, width in (("attn.q_proj", 16), ("attn.k_proj", 4), ("mlp.up_proj", 32))
} | {"lm_head": LinearShape(16, 100, is_head=True)}


def ranks(**lora: object) -> dict[str, int]:
    return choose_ranks(LoraConfig(**{"rank": 2, **lora}), MODEL)  # type: ignore[arg-type]


def test_all_linear_leaves_the_head_out() -> None:
    assert ranks() == {module: 2 for module in MODEL if module != "lm_head"}


def test_a_target_is_a_whole_component_not_a_part_of_one() -> None:
    assert set(ranks(target_modules=("layers.1.attn.q_proj",))) == {"model.layers.1.attn.q_proj"}
    with pytest.raises(ConfigError, match="'proj' matches no linear module"):
        ranks(target_modules=("proj",))


def test_the_longest_rank_pattern_wins() -> None:
    found = ranks(target_modules=("q_proj",), rank_pattern={"q_proj": 4, "layers.10.attn.q_proj": 8})
    assert found == {
        "model.layers.0.attn.q_proj": 4,
        "model.layers.1.attn.q_proj": 4,
        "model.layers.10.attn.q_proj": 8,
    }


def test_problems_are_gathered() -> None:
    with pytest.raises(ConfigError) as caught:
        ranks(rank=5, target_modules=("k_proj", "kproj"), rank_pattern={"up_proj": 3})
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "Did you mean k_proj?" in text
    assert "'up_proj' matches no linear module" in text
    assert "lora.rank=5 is more than the width 4 of k_proj (3 modules)" in text


def test_a_pattern_rank_that_is_too_wide_is_named() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank=6 is more than the width 4 of k_proj"):
        ranks(rank_pattern={"k_proj": 6})

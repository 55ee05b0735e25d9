"""Sizes that follow from config.json alone, against counts that others have published."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import LoraConfig
from finetune.models.architecture import Architecture, read_architecture
from finetune.planning.runs import count_adapters

# Parameters as stated by the models' makers, or counted from their files.
PUBLISHED = {
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "mistral_7b_v03": 7_248_023_552,
    "qwen2_0_5b": 494_032_768,
    "qwen2.5_3b": 3_085_938_688,
    "qwen3_0.6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "gemma2_2b": 2_614_341_888,
    "gpt2": 124_439_808,
}


def read(shared: Path, name: str) -> Architecture:
    config = json.loads((shared / "configs" / "models" / f"{name}.config.json").read_text())
    found = read_architecture(config)
    assert found is not None
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(shared: Path, name: str) -> None:
    assert read(shared, name).parameters == PUBLISHED[name]


@pytest.mark.parametrize(("name", "rank", "expected"), [("qwen2.5_3b", 16, 3_686_400), ("llama3_2_3b", 32, 9_175_040)])
def test_adapters_on_queries_and_values_have_the_published_parameters(
    shared: Path, name: str, rank: int, expected: int
) -> None:
    lora = LoraConfig(rank=rank, target_modules=("q_proj", "v_proj"))
    assert count_adapters(read(shared, name), lora, use_dora=False).parameters == expected


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8,
         "intermediate_size": 8, "num_local_experts": 8},
        {"model_type": "rwkv5", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8},
    ],
)  # fmt: skip
def test_what_is_no_such_decoder_has_no_sizes(config: dict[str, Any]) -> None:
    assert read_architecture(config) is None

"""What is predicted: figures that follow from sizes, and how they change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.models.architecture import Architecture, read_architecture
from finetune.planning.memory import PlannedRun, plan_memory

SMALL = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
RUN = PlannedRun(
    engine="mlx",
    method="lora",
    value_bytes=4,
    bits=None,
    adapter_parameters=1_000_000,
    ranks=112,
    moments=2,
    tokens=4_000,
    longest=1_000,
    trained=4_000,
)


@pytest.fixture
def small() -> Architecture:
    found = read_architecture(SMALL)
    assert found is not None
    return found


def read(shared: Path, name: str) -> Architecture:
    found = read_architecture(json.loads((shared / "configs" / "models" / f"{name}.config.json").read_text()))
    assert found is not None
    return found


def test_adapters_need_weights_gradients_and_two_moments(small: Architecture) -> None:
    plan = plan_memory(small, RUN)
    assert plan.weights == small.parameters * 4
    assert plan.trained + plan.optimizer == 16 * RUN.adapter_parameters
    assert plan.total == plan.libraries + plan.arrays


def test_activations_grow_with_tokens_and_shrink_with_recomputation(small: Architecture) -> None:
    once = plan_memory(small, RUN).activations
    assert plan_memory(small, replace(RUN, tokens=8_000)).activations == pytest.approx(2 * once, rel=0.02)
    assert plan_memory(small, replace(RUN, recompute=True)).activations < 0.4 * once
    assert plan_memory(small, replace(RUN, value_bytes=2)).activations == pytest.approx(once / 2)


@pytest.mark.parametrize("engine", ["mlx", "pytorch"])
def test_a_quantised_base_shrinks_to_its_bits_and_scales(small: Architecture, engine: str) -> None:
    run = replace(RUN, engine=engine, value_bytes=2)  # type: ignore[arg-type]
    linear = small.linear_weights
    saved = plan_memory(small, run).weights - plan_memory(small, replace(run, bits=4)).weights
    assert saved == pytest.approx(linear * (2 - 0.5 - 4 / 64))


def test_logits_are_those_of_a_chunk_whatever_the_rows(small: Architecture) -> None:
    plan = plan_memory(small, RUN)
    many = plan_memory(small, replace(RUN, tokens=40_000, trained=40_000))
    assert many.logits - plan.logits == 2 * 36_000 * 512 * 4  # hidden states and their gradient
    assert plan_memory(small, replace(RUN, trained=10)).logits < plan.logits / 10


def test_full_fine_tuning_needs_sixteen_bytes_a_parameter_in_float32_on_mlx(small: Architecture) -> None:
    plan = plan_memory(small, replace(RUN, method="full", adapter_parameters=0, ranks=0))
    assert plan.weights + plan.trained + plan.optimizer == 16 * small.parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mistral_7b_v03", 13.5009 * 2**30),  # float16, active after loading on a Mac
        ("llama2_7b", 13.52e9),  # LitGPT, bf16 inference, which also holds a small cache
    ],
)
def test_weights_of_7b_models_are_the_published_ones(shared: Path, name: str, published: float) -> None:
    assert plan_memory(read(shared, name), replace(RUN, value_bytes=2)).weights == pytest.approx(published, rel=0.01)

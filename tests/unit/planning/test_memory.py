"""What is predicted: figures that follow from sizes, and how they change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.engines.registry import EngineName
from finetune.models.architecture import Architecture, read_architecture
from finetune.planning.memory import plan_memory
from finetune.planning.planned import PlannedRun

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


@pytest.mark.parametrize("engine", ["mlx", "pytorch"])
def test_activations_grow_with_tokens_and_shrink_with_recomputation(small: Architecture, engine: EngineName) -> None:
    run = replace(RUN, engine=engine)
    once = plan_memory(small, run).activations
    assert plan_memory(small, replace(run, tokens=8_000)).activations == pytest.approx(
        2 * once, rel=0.1
    )  # the moment of the peak moves
    assert plan_memory(small, replace(run, recompute=True)).activations < 0.5 * once


@pytest.mark.parametrize("engine", ["mlx", "pytorch"])
def test_a_quantised_base_shrinks_to_its_bits_and_scales(small: Architecture, engine: EngineName) -> None:
    run = replace(RUN, engine=engine, value_bytes=2)
    linear = small.linear_weights
    saved = plan_memory(small, run).weights - plan_memory(small, replace(run, bits=4)).weights
    scales = {"mlx": 4 / 64, "pytorch": 1 / 64 + 4 / (64 * 256)}[engine]  # bytes a weight
    assert saved == pytest.approx(linear * (2 - 0.5 - scales))


def test_logits_are_those_of_a_chunk_whatever_the_rows(small: Architecture) -> None:
    plan = plan_memory(small, RUN)
    many = plan_memory(small, replace(RUN, tokens=40_000, trained=40_000))
    assert many.logits - plan.logits == 2 * 36_000 * 512 * 4  # hidden states and their gradient
    assert plan_memory(small, replace(RUN, trained=10)).logits < plan.logits / 10


@pytest.mark.parametrize("engine", ["mlx", "pytorch"])
@pytest.mark.parametrize(("value_bytes", "a_parameter"), [(4, 16), (2, 18)])
def test_full_fine_tuning_works_on_a_float32_base_in_place(
    small: Architecture, engine: EngineName, value_bytes: int, a_parameter: int
) -> None:
    run = replace(RUN, engine=engine, method="full", adapter_parameters=0, ranks=0, value_bytes=value_bytes)
    plan = plan_memory(small, run)
    assert plan.weights + plan.trained + plan.optimizer == a_parameter * small.parameters


def test_a_heap_that_gives_memory_back_has_fewer_holes(small: Architecture) -> None:
    run = replace(RUN, engine="pytorch")  # arrays of 8 and 22 MB
    held = plan_memory(small, run)
    assert held.holes > 0.3 * held.activations
    assert plan_memory(small, replace(run, returns_memory=True)).holes == 0
    assert plan_memory(small, replace(run, on_cpu=False)).holes == 0


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mistral_7b_v03", 13.5009 * 2**30),  # float16, active after loading on a Mac
        ("llama2_7b", 13.52e9),  # LitGPT, bf16 inference, which also holds a small cache
    ],
)
def test_weights_of_7b_models_are_the_published_ones(shared: Path, name: str, published: float) -> None:
    assert plan_memory(read(shared, name), replace(RUN, value_bytes=2)).weights == pytest.approx(published, rel=0.01)

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
    run = replace(RUN, engine=engine, trained=2)  # a loss that needs little
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


def test_pytorch_has_the_logits_of_a_chunk_whatever_the_rows(small: Architecture) -> None:
    run = replace(RUN, engine="pytorch", recompute=True, tokens=100)  # a backward pass that needs less
    plan, many = plan_memory(small, run), plan_memory(small, replace(run, trained=40_000))
    assert many.logits - plan.logits == 2 * 36_000 * 512 * 4  # hidden states and their gradient
    assert plan_memory(small, replace(run, trained=10)).logits < plan.logits / 10


def test_mlx_has_as_many_chunks_of_the_loss_as_it_makes_arrays_ahead(small: Architecture) -> None:
    """A chunk has seven arrays of 512 rows; those of one graph fill the queue from the third chunk on."""

    def arrays(trained: int, graphs: int = 1) -> float:
        run = replace(RUN, tokens=100, trained=trained, graphs=graphs)
        hidden = 2 * trained * 512 * 4
        return (plan_memory(small, run).logits - hidden) / (512 * 8192 * 4)

    assert [arrays(rows) for rows in (256, 512, 1_024, 1_536, 10_240)] == [3.5, 7, 14, 17, 17]
    assert arrays(10_240, graphs=2) == 19
    assert plan_memory(small, replace(RUN, on_cpu=False)).logits < plan_memory(small, RUN).logits


def test_what_the_loss_leaves_of_the_queue_is_of_the_backward_pass(small: Architecture) -> None:
    run = replace(RUN, tokens=1_000, longest=500)
    full, half = (plan_memory(small, replace(run, trained=trained)).activations for trained in (1_000, 256))
    in_the_pass = plan_memory(small, replace(run, trained=2)).activations
    assert full < half < in_the_pass


def test_long_documents_need_their_scores_on_the_way_back(small: Architecture) -> None:
    run = replace(RUN, trained=2, tokens=8_000)
    short, long = (plan_memory(small, replace(run, longest=longest)).activations for longest in (600, 8_000))
    assert long - short > 2 * 8 * 8_000 * 4_064 * 4  # heads x tokens x keys that a query meets on average


@pytest.mark.parametrize("engine", ["mlx", "pytorch"])
@pytest.mark.parametrize(("value_bytes", "a_parameter"), [(4, 16), (2, 18)])
def test_full_fine_tuning_works_on_a_float32_base_in_place(
    small: Architecture, engine: EngineName, value_bytes: int, a_parameter: int
) -> None:
    run = replace(RUN, engine=engine, method="full", adapter_parameters=0, ranks=0, value_bytes=value_bytes, calls=2)
    plan = plan_memory(small, run)
    assert plan.weights + plan.trained + plan.optimizer == a_parameter * small.parameters


def test_on_mlx_gradients_of_all_weights_are_there_with_the_update_or_with_those_of_another_micro_batch(
    small: Architecture,
) -> None:
    many = replace(RUN, method="full", adapter_parameters=0, ranks=0)
    few = replace(many, tokens=50, longest=50, trained=50)
    passes, sums, update = (plan_memory(small, run) for run in (many, replace(many, calls=2), few))
    assert (passes.trained, sums.trained) == (0, 4 * small.parameters)
    assert passes.update == sums.update == 0 < passes.activations
    assert (update.trained, update.activations, update.logits) == (4 * small.parameters, 0, 0)
    assert update.update == 9 * 8192 * 512 * 4  # the embedding
    assert plan_memory(small, replace(few, engine="pytorch")).update == 0


def test_a_heap_that_gives_memory_back_has_no_holes(small: Architecture) -> None:
    run = replace(RUN, engine="pytorch")  # arrays of 8 and 22 MB
    # Queries, keys and three arrays for each on the way, two results of products; half of the logits of 896 rows.
    assert plan_memory(small, run).holes == 8 * 4_000 * (2 * 4 + 2) * 512 * 4 + 896 * 8192 * 4
    assert plan_memory(small, replace(run, returns_memory=True)).holes == 0
    assert plan_memory(small, replace(run, on_cpu=False)).holes == 0


def test_what_dora_keeps_leaves_no_hole(small: Architecture) -> None:
    run = replace(RUN, engine="pytorch")
    lora, dora = (plan_memory(small, replace(run, method=method)) for method in ("lora", "dora"))
    assert dora.activations - lora.activations == lora.holes - dora.holes == 8 * 4_000 * (2 + 2) * 512 * 4


def test_4_bits_come_with_their_library(small: Architecture) -> None:
    run = replace(RUN, engine="pytorch")
    dense, packed = (plan_memory(small, replace(run, bits=bits)).libraries for bits in (8, 4))
    assert packed - dense == 56 * 2**20


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mistral_7b_v03", 13.5009 * 2**30),  # float16, active after loading on a Mac
        ("llama2_7b", 13.52e9),  # LitGPT, bf16 inference, which also holds a small cache
    ],
)
def test_weights_of_7b_models_are_the_published_ones(shared: Path, name: str, published: float) -> None:
    assert plan_memory(read(shared, name), replace(RUN, value_bytes=2)).weights == pytest.approx(published, rel=0.01)


def test_rows_of_many_lengths_in_16_bits_have_as_many_compiled_products_as_are_kept(small: Architecture) -> None:
    def libraries(sizes: int, value_bytes: int = 2) -> int:
        run = replace(RUN, engine="pytorch", sizes=sizes, value_bytes=value_bytes)
        return plan_memory(small, run).libraries - 376 * 2**20

    assert [libraries(sizes) // 2**19 for sizes in (1, 2, 50)] == [21, 42, 128]  # seven modules
    assert libraries(50, value_bytes=4) == 0

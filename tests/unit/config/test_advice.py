"""Advice names what is unusual and stays silent about what is not."""

from dataclasses import replace

import pytest

from finetune.config.advice import LengthFacts, advise, recommended_length
from finetune.config.load import load_config
from finetune.config.schema import RunConfig


def config(*overrides: str) -> RunConfig:
    needed = ["model.name=demo", "data.train_file=rows.jsonl"]
    return load_config(None, environ={}, overrides=[*needed, *overrides]).config


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["lora.rank=16", "lora.alpha=128"], "lora.alpha = 128 is far from 2 x rank (32)"),
        (["lora.rank=16", "lora.alpha=8"], "lora.alpha = 8 is far from 2 x rank (32)"),
        (
            ["lora.use_rslora=true"],
            "lora.use_rslora with rank 16 and alpha 32 scales the update by 8, usual is about 2",
        ),
        (["training.learning_rate=0.01"], "training.learning_rate = 0.01 is outside the usual 2e-05 to 0.001 for LoRA"),
        (["training.learning_rate=1e-6"], "training.learning_rate = 1e-06 is outside"),
        (["training.method=full"], "training.learning_rate = 0.0002 is outside the usual 1e-06 to 0.0001 for full"),
        (["lora.dropout=0.5"], "lora.dropout = 0.5"),
        (["model.init=random"], "model.init = random with adapters"),
        (
            ["training.method=dora", "lora.dropout=0.1"],
            "lora.dropout = 0.1 with DoRA reaches the low-rank branch alone",
        ),
        (["training.method=dora", "lora.alpha=256"], "lora.alpha = 256 is far from 2 x rank"),
        (["training.method=dora", "training.learning_rate=0.01"], "training.learning_rate = 0.01 is outside the usual"),
        (["model.dtype=float16"], "model.dtype = float16"),
        (["training.label_smoothing=0.5"], "training.label_smoothing = 0.5"),
        (["training.batch_size=1"], "training.batch_size x training.gradient_accumulation_steps = 1"),
        (["training.batch_size=1024"], "training.batch_size x training.gradient_accumulation_steps = 1024"),
        (["training.max_steps=100", "training.warmup_steps=50"], "training.warmup_steps = 50 is 50% of the 100 steps"),
        (["training.max_steps=100", "output.eval_steps=200"], "output.eval_steps = 200 is more than the 100 steps"),
    ],
)
def test_an_unusual_value_is_named(overrides: list[str], start: str) -> None:
    assert any(sentence.startswith(start) for sentence in advise(config(*overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lora.alpha=16"],
        ["training.method=dora"],
        ["lora.dropout=0.1"],
        ["lora.use_rslora=true", "lora.alpha=8"],
        ["training.optimizer=sgd", "training.learning_rate=0.1"],
        ["training.method=full", "training.learning_rate=1e-5"],
        ["training.method=full", "model.init=random", "training.learning_rate=1e-3"],
        ["training.max_steps=1000", "training.warmup_steps=100"],
    ],
)
def test_usual_values_need_no_advice(overrides: list[str]) -> None:
    assert advise(config(*overrides)) == ()


def test_measured_lengths_are_compared_with_the_limit() -> None:
    common = {"rows": 100, "validation_rows": 10, "total_steps": 75}
    within = LengthFacts(rows=100, longest=300, beyond=0)

    (above,) = advise(config("data.max_length=2048"), lengths=within, **common)
    (below,) = advise(config("data.max_length=64", "data.on_long=drop"), lengths=replace(within, beyond=100), **common)

    assert above.startswith("data.max_length = 2048 is far above the data: the longest row has 300 tokens. 320 does")
    assert below.startswith("100 of 100 rows are longer than data.max_length = 64 and are left out.")
    assert advise(config("data.max_length=512"), lengths=within, **common) == ()
    assert recommended_length(320) == 320


def test_measured_rows_are_compared_with_the_run() -> None:
    few = advise(config("training.batch_size=64"), rows=20, total_steps=30)
    often = advise(config(), rows=20, total_steps=500)
    short = advise(config(), rows=20, total_steps=5)

    assert any("is more than the 20 training rows" in sentence for sentence in few)
    assert any("reads each row about 100 times" in sentence for sentence in often)
    assert any("has only 5 steps" in sentence for sentence in short)


def test_evaluations_that_cost_much_of_the_run_are_named() -> None:
    facts = {"rows": 9_000, "validation_rows": 5_000, "total_steps": 100, "evaluated_rows": 55_000}

    (advice,) = advise(config(), **facts)
    assert advice.startswith("Evaluations read 55,000 rows and training 400,")
    assert "output.eval_rows=1000" in advice
    assert advise(config("output.eval_rows=1000"), **facts) == ()
    assert advise(config(), **{**facts, "validation_rows": 900}) == ()
    assert advise(config(), **{**facts, "evaluated_rows": 400}) == ()


def test_early_stopping_without_a_validation_row_is_named() -> None:
    chosen = config("training.early_stopping_patience=2")

    assert any("early_stopping_patience" in sentence for sentence in advise(chosen, validation_rows=0))
    assert advise(chosen, validation_rows=5) == ()


def test_a_small_model_may_learn_ten_times_faster() -> None:
    fast = config("training.learning_rate=0.004")

    assert any("learning_rate" in sentence for sentence in advise(fast))
    assert not any("learning_rate" in sentence for sentence in advise(fast, parameters=1_200_000))
    assert any("learning_rate" in sentence for sentence in advise(fast, parameters=1_200_000_000))

"""Rules that join two options."""

from pathlib import Path

import pytest

from finetune.config.checks import failed_checks
from finetune.config.layers import Given
from finetune.config.load import load_config, sources_of
from finetune.config.schema import RunConfig
from finetune.config.sources import Layer, Source
from finetune.core.errors import ConfigError

NEEDED = ["model.name=demo", "data.train_file=rows.jsonl"]


def problems_of(*overrides: str) -> list[str]:
    try:
        load_config(None, environ={}, overrides=[*NEEDED, *overrides])
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("overrides", "key", "sentence"),
    [
        (["model.quantization=4bit", "training.method=full"], "model.quantization", "cannot be changed"),
        (["model.quantization=8bit", "model.init=random"], "model.quantization", "drawn at random"),
        (["training.max_steps=10", "training.warmup_steps=10"], "training.warmup_steps", "before the warm-up"),
        (["training.min_learning_rate=0.1"], "training.min_learning_rate", "above its peak"),
        (["training.max_batch_tokens=100", "data.max_length=101"], "training.max_batch_tokens", "does not fit"),
        (["data.validation_file=rows.jsonl"], "data.validation_file", "measure what was trained on"),
        (["data.train_file=[]"], "data.train_file", "the list is empty"),
        (["lora.target_modules=[]"], "lora.target_modules", "nothing would be trained"),
    ],
)
def test_what_cannot_work_together_is_refused(overrides: list[str], key: str, sentence: str) -> None:
    (problem,) = problems_of(*overrides)

    assert problem.startswith(f"{key} = ")
    assert sentence in problem


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.validation_file=v.jsonl", "data.validation_split=0.2"], "data.validation_split"),
        (["training.schedule=constant", "training.min_learning_rate=1e-6"], "training.min_learning_rate"),
        (["training.optimizer=adafactor", "training.beta2=0.9"], "training.beta2"),
        (["training.optimizer=sgd", "training.epsilon=1e-6"], "training.epsilon"),
        (["training.early_stopping_threshold=0.1"], "training.early_stopping_threshold"),
        (["training.early_stopping_patience=2", "data.validation_split=0"], "training.early_stopping_patience"),
        (["output.sample_prompts=0", "output.sample_tokens=8"], "output.sample_tokens"),
        (["training.method=full", "lora.rank=4"], "lora.rank"),
    ],
)
def test_an_option_without_effect_is_refused(overrides: list[str], key: str) -> None:
    (problem,) = problems_of(*overrides)

    assert problem.startswith(f"{key} = ")
    assert "has no effect" in problem


def test_a_later_layer_may_switch_off_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text("model:\n  name: demo\nlora:\n  rank: 4\ndata:\n  train_file: rows.jsonl\n", encoding="utf-8")

    loaded = load_config(file, environ={}, flags={"training.method": "full"})

    assert loaded.config.training.method == "full"


def test_a_value_of_a_profile_may_be_without_effect() -> None:
    config = RunConfig.model_validate(
        {"model": {"name": "demo"}, "data": {"train_file": "r"}, "training": {"early_stopping_threshold": 0.1}}
    )
    key = "training.early_stopping_threshold"

    assert not failed_checks(config, sources_of({key: Given(0.1, Source(Layer.PROFILE, "chat"))}))
    assert failed_checks(config, sources_of({key: Given(0.1, Source(Layer.FILE, "run.yml", 3))}))


def test_rules_are_checked_beside_other_problems_but_not_on_wrong_values() -> None:
    rank, warmup = problems_of("lora.rank=0", "training.max_steps=5", "training.warmup_steps=9")

    assert rank == "lora.rank = 0 (--set): must be greater than 0."
    assert warmup.startswith("training.warmup_steps = 9 (--set): the run would end before the warm-up does.")
    assert problems_of("training.max_steps=0", "training.warmup_steps=9") == [
        "training.max_steps = 0 (--set): must be greater than 0."
    ]

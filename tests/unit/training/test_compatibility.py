"""What may differ when a run goes on."""

import pytest

from finetune.config.schema import RunConfig
from finetune.training.compatibility import MAY_CHANGE, config_differences, fact_differences


def config(**sections) -> RunConfig:
    given = {"model": {"name": "a"}, "data": {"train_file": "b"}}
    return RunConfig.model_validate(
        {name: given.get(name, {}) | sections.get(name, {}) for name in (*given, *sections)}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"output": {"eval_steps": 7, "checkpoint_steps": 3, "keep_checkpoints": 1, "sample_prompts": 0}},
        {"model": {"name": "elsewhere"}, "data": {"train_file": "moved.jsonl"}},
        {"training": {"early_stopping_patience": 2}},
    ],
)
def test_cadence_places_and_patience_may_change(change):
    assert config_differences(config(), config(**change)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate was 0.0002 and is now 0.001"),
        ({"training": {"max_steps": 9}}, "training.max_steps was None and is now 9"),
        ({"training": {"seed": 1}}, "training.seed was 42 and is now 1"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout was 0.0 and is now 0.1"),
        ({"data": {"template": "chatml"}}, "data.template was None and is now 'chatml'"),
    ],
)
def test_what_changes_a_step_is_named(change, sentence):
    assert config_differences(config(), config(**change)) == [sentence]


def test_options_without_effect_do_not_count():
    full = {"training": {"method": "full"}}

    assert config_differences(config(**full), config(**full, lora={"rank": 4})) == []


def test_every_exception_is_an_option_of_the_schema():
    for key in MAY_CHANGE:
        section, name = key.split(".")
        assert name in type(getattr(config(), section)).model_fields


def test_nested_facts_are_compared_and_named():
    before = {"model": {"config.json": "abc", "model.safetensors": "0123456789abcdef0123456789abcdef"}, "rows": 3}
    after = {"model": {"config.json": "abd", "model.safetensors": "0123456789abcdef0123456789abcdef"}, "more": True}

    assert fact_differences(before, after) == [
        "model config.json was abc and is now abd",
        "rows was 3 and is now not there",
        "more was not there and is now True",
    ]
    assert fact_differences(before, before) == []

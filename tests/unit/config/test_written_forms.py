"""A configuration as YAML, as JSON schema, as a page: all made from the schema."""

from pathlib import Path

import pytest

from finetune.config.dump import dump_config, json_schema
from finetune.config.layers import profile_names
from finetune.config.load import load_config
from finetune.config.options import OTHER_NAMES, options, sections
from finetune.config.reference import reference
from finetune.config.schema import RunConfig

REPOSITORY = Path(__file__).resolve().parents[3]


def resolved(*overrides: str, profile: str | None = None) -> RunConfig:
    needed = ["model.name=demo", "data.train_file=[a.jsonl, {path: b.jsonl, weight: 0.5}]"]
    return load_config(None, profile=profile, environ={}, overrides=[*needed, *overrides]).config


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.learning_rate=1e-7", "training.max_grad_norm=null", "model.name=a: b # c"],
        ["lora.rank_pattern={q_proj: 4}", "data.columns={prompt: 'no'}", "lora.target_modules=[q_proj]"],
        ["data.validation_file=v.jsonl", "training.early_stopping_patience=3"],
        ["training.method=full", "training.schedule=constant", "output.sample_prompts=0", "training.optimizer=sgd"],
    ],
)
def test_a_dumped_configuration_loads_as_the_same(tmp_path: Path, overrides: list[str]) -> None:
    config = resolved(*overrides)
    file = tmp_path / "config.yml"
    file.write_text(dump_config(config), encoding="utf-8")

    assert load_config(file, environ={}).config == config


def test_a_dump_leaves_out_what_a_later_layer_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text("model:\n  name: demo\nlora:\n  rank: 4\ndata:\n  train_file: rows.jsonl\n", encoding="utf-8")
    config = load_config(file, environ={}, flags={"training.method": "full"}).config
    file.write_text(dump_config(config), encoding="utf-8")

    assert "lora" not in file.read_text(encoding="utf-8")
    assert load_config(file, environ={}).config.training == config.training


def test_the_json_schema_describes_every_option() -> None:
    definitions = json_schema()["$defs"]
    described = {
        f"{section}.{name}"
        for section, model in sections().items()
        for name, option in definitions[model.__name__]["properties"].items()
        if option.get("description")
    }

    assert described == set(options())
    assert json_schema()["additionalProperties"] is False


def test_the_reference_page_is_current() -> None:
    page = REPOSITORY / "docs" / "configuration.md"

    assert page.read_text(encoding="utf-8") == reference(), (
        "docs/configuration.md is out of date. Run: python -m finetune.config.reference > docs/configuration.md"
    )


def test_every_option_has_a_description_and_every_other_name_leads_to_one() -> None:
    assert all(option.description for option in options().values())
    assert set(OTHER_NAMES.values()) <= set(options())


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_loads_and_leaves_the_data_and_the_model_to_the_person(name: str) -> None:
    loaded = load_config(
        None, profile=name, environ={}, overrides=["model.name=demo", "data.train_file=rows.jsonl", "lora.rank=3"]
    )
    from_profile = {key for key, source in loaded.sources.items() if str(source) == f"profile {name}"}

    assert from_profile
    assert loaded.config.lora.rank == 3
    assert not from_profile & {"data.max_length", "training.epochs", "lora.alpha", "output.output_dir", "data.template"}

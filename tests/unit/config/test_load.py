"""Where values come from, and how what is wrong with them is said."""

from pathlib import Path

import pytest

from finetune.config.load import LoadedConfig, load_config
from finetune.config.sources import Layer
from finetune.core.errors import ConfigError

MINIMAL = "model:\n  name: demo\ndata:\n  train_file: rows.jsonl\n"

# What a person's file may look like: every section, comments, quotes, numbers in both notations.
EVERYDAY = """\
# tuned on the office machine
model:
  name: "some-org/Some-Model-7b"
  backend: "auto"
  quantization: null   # 4bit, 8bit
lora:
  rank: 16
  alpha: 32
  dropout: 0.05
  target_modules: ["q_proj", "v_proj"]
training:
  learning_rate: 1e-4
  batch_size: 4
  gradient_accumulation_steps: 4
  max_steps: 1000
  warmup_steps: 100
data:
  train_file: "data/train.jsonl"
  validation_file: "data/val.jsonl"
  template: "alpaca"
  max_length: 2048
output:
  output_dir: "./outputs"
  checkpoint_steps: 100
  eval_steps: 50
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = MINIMAL, **layers: object) -> LoadedConfig:
    return load_config(write(folder, text), **{"environ": {}, **layers})  # type: ignore[arg-type]


def problems_of(folder: Path, text: str = MINIMAL, **layers: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, **layers)
    return list(caught.value.problems)


def test_a_users_file_loads_as_it_is(shared: Path) -> None:
    loaded = load_config(shared / "configs" / "train.yml", environ={})

    assert loaded.config.training.learning_rate == 1e-4
    assert loaded.config.lora.target_modules == ("q_proj", "v_proj", "k_proj", "o_proj")


def test_an_everyday_file_loads_with_the_line_of_each_value(tmp_path: Path) -> None:
    loaded = load(tmp_path, EVERYDAY)

    assert loaded.config.training.learning_rate == 1e-4
    assert loaded.config.model.quantization is None
    assert loaded.describe("data.max_length") == "data.max_length = 2048 (run.yml:21)"
    assert str(loaded.sources["training.seed"]) == "default"


def test_later_layers_win_and_are_named(tmp_path: Path) -> None:
    rate = "training.learning_rate"
    text = MINIMAL + "training:\n  learning_rate: 0.2\n"
    variables = {"FT_TRAINING__LEARNING_RATE": "3e-1"}

    profile = load(tmp_path, MINIMAL, profile="chat")
    file = load(tmp_path, text, profile="chat")
    environment = load(tmp_path, text, environ=variables)
    override = load(tmp_path, text, environ=variables, overrides=[f"{rate}=0.4"])
    flag = load(
        tmp_path, text, environ=variables, overrides=[f"{rate}=0.4"], flags={rate: 0.5, "training.epochs": None}
    )

    assert profile.sources[rate].layer is Layer.PROFILE
    assert [loaded.value(rate) for loaded in (file, environment, override, flag)] == [0.2, 0.3, 0.4, 0.5]
    assert str(profile.sources[rate]) == "profile chat"
    assert str(file.sources[rate]) == "run.yml:6"
    assert str(environment.sources[rate]) == "environment variable FT_TRAINING__LEARNING_RATE"
    assert str(override.sources[rate]) == "--set"
    assert str(flag.sources[rate]) == "--learning-rate"


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load(tmp_path, overrides=["lora.rank=2", "lora.rank=3"]).config.lora.rank == 3


def test_shell_values_are_read_as_yaml_but_text_stays_text(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        overrides=["training.max_grad_norm=null", "lora.target_modules=[q_proj, v_proj]", "output.output_dir=2024"],
        environ={"FT_MODEL__NAME": "a: b # c", "FT_DATA__TRAIN_FILE": "[a, {path: b}]", "FT_DATA__TEMPLATE": "null"},
    )

    assert loaded.config.model.name == "a: b # c"
    assert len(loaded.config.data.train_file) == 2
    assert loaded.config.data.template is None

    assert loaded.config.training.max_grad_norm is None
    assert loaded.config.lora.target_modules == ("q_proj", "v_proj")
    assert loaded.config.output.output_dir == "2024"


def test_a_date_in_a_file_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "output:\n  output_dir: 2024-05-01\n").config.output.output_dir == "2024-05-01"


def test_files_with_weights_are_read(tmp_path: Path) -> None:
    text = "model:\n  name: demo\ndata:\n  train_file:\n    - a.jsonl\n    - path: b.jsonl\n      weight: 2\n"

    first, second = load(tmp_path, text).config.data.train_file

    assert first == "a.jsonl"
    assert (second.path, second.weight) == ("b.jsonl", 2.0)  # type: ignore[union-attr]


def test_every_problem_of_every_layer_is_reported_at_once(tmp_path: Path) -> None:
    text = "model:\n  nam: demo\ntraining:\n  batch_size: 0\n  learning_rate: fast\nlogging:\n  level: INFO\n"

    found = problems_of(
        tmp_path,
        text,
        profile="poetry",
        environ={"FT_LORA__RANG": "4", "FT_DEBUG": "1"},
        overrides=["lora.alpha=-1", "x"],
    )

    assert found == [
        "model.name: missing. Give it in the file, or with --set model.name=... "
        "(a local directory, the name of a model on the hub, or `demo`).",
        "data.train_file: missing. Give it in the file, or with --set data.train_file=... "
        "(file, directory, "
        "hf://datasets/owner/name[@revision][/path], or a list of them with weights).",
        "profile poetry: there is no such profile. Choose one of chat, code, domain, instruction, quick.",
        "model.nam (line 2): unknown key. Did you mean model.name?",
        "training.batch_size = 0 (line 4): must be greater than 0.",
        "training.learning_rate = fast (line 5): must be a number, not text.",
        "logging (line 6): unknown section. Known here: model, lora, training, data, output.",
        "lora.rang (environment variable FT_LORA__RANG): unknown key. Did you mean lora.rank?",
        "--set x: must look like section.key=value, for example training.learning_rate=1e-4.",
        "lora.alpha = -1 (--set): must be greater than 0.",
    ]


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("training", "learning_rat", "training.learning_rate"),
        ("training", "max_length", "data.max_length"),
        ("training", "num_epochs", "training.epochs"),
        ("training", "per_device_batch_size", "training.batch_size"),
        ("training", "save_steps", "output.checkpoint_steps"),
        ("model", "max_seq_length", "data.max_length"),
        ("lora", "r", "lora.rank"),
        ("data", "Train-File", "data.train_file"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(
    tmp_path: Path, section: str, key: str, meant: str
) -> None:
    text = {"model": "", "data": ""} | {section: f"  {key}: 1\n"}
    document = "".join(f"{name}:\n{body}" for name, body in text.items())

    assert any(problem.endswith(f"unknown key. Did you mean {meant}?") for problem in problems_of(tmp_path, document))


def test_a_key_without_its_section_is_answered_with_the_whole_key(tmp_path: Path) -> None:
    assert problems_of(tmp_path, MINIMAL + "lr: 1e-4\ntrainin:\n  epochs: 1\n") == [
        "lr (line 5): unknown section. Did you mean training.learning_rate?",
        "trainin (line 6): unknown section. Did you mean training?",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora:\n  dropout: 1.0", "lora.dropout = 1.0 (line 6): must be less than 1."),
        ("training:\n  learning_rate: 2", "training.learning_rate = 2 (line 6): must be at most 1."),
        ("training:\n  seed: -1", "training.seed = -1 (line 6): must be at least 0."),
        ("training:\n  batch_size: 2.5", "training.batch_size = 2.5 (line 6): must be a whole number."),
        ("training:\n  epochs: .inf", "training.epochs = inf (line 6): must be a finite number."),
        ("training:\n  gradient_checkpointing: 1", "= 1 (line 6): must be true or false, not a number."),
        ("training:\n  learning_rate: '1e-4'", "= 1e-4 (line 6): must be a number, not text. Write it without quotes."),
        ("training:\n  optimizer: adamm", "must be one of adamw, adam, sgd, adafactor. Did you mean adam?"),
        ("lora:\n  target_modules: 5", "(line 6): must be all-linear, or a list of module names, not a number."),
        ("lora:\n  rank_pattern: 5", "(line 6): must be a mapping of names to values, not a number."),
        ("lora:\n  rank_pattern:\n    q_proj: 0", "lora.rank_pattern.q_proj = 0 (line 7): must be greater than 0."),
        ("lora: 16", "lora = 16 (line 5): must hold options, one a line below it, not a number."),
        ("lora:\n  rank: 8\n  rank: 9", "line 7: rank: given twice (first in line 6). Keep one."),
        ("lora:\n  rank: !!python/name:os.system x", "line 6: x: the tag tag:yaml.org,2002:python/name:"),
        ("lora:\n  ? [a]\n  : 1", "line 6: a key must be a word, not a list or a mapping."),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_it_must_be(tmp_path: Path, line: str, said: str) -> None:
    assert any(said in problem for problem in problems_of(tmp_path, f"{MINIMAL}{line}\n"))


def test_what_is_wrong_inside_a_list_of_files_is_named_with_its_place(tmp_path: Path) -> None:
    text = "model:\n  name: demo\ndata:\n  train_file:\n    - path: a\n      weight: 0\n    - pth: b\n"

    assert problems_of(tmp_path, text) == [
        "data.train_file[0].weight = 0 (line 6): must be greater than 0.",
        "data.train_file[1] (line 7): has no path.",
        "data.train_file[1].pth = b (line 7): unknown key. Known here: path, weight.",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: demo\ndata: x", "line 2: "),
        ("model:\n\tname: demo\n", "line 2: a tab where YAML needs spaces. Indent with spaces."),
        ("model: a: b\n", "line 1: a second `:` or a wrong indentation. Put quotes around text that contains `: `."),
        ("- model\n", "the file holds a list. It must hold sections: model, lora, training, data, output."),
        ("a: &a [*a]\n", "line 1: "),
        ("a\x00b", "not YAML: "),
        ("[" * 600, "values are nested too deeply"),
    ],
)
def test_text_that_is_not_a_configuration_gives_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    (problem,) = problems_of(tmp_path, text)

    assert said in problem


def test_aliases_cannot_blow_up_memory(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 9)]

    (problem,) = problems_of(tmp_path, "\n".join(levels))

    assert "more values, or deeper ones, than a configuration has" in problem


def test_a_file_that_cannot_be_read_is_not_reported_as_empty(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yml"
    latin.write_bytes("model:\n  name: café\n".encode("latin-1"))

    with pytest.raises(ConfigError, match=r"there is no such file. Did you mean .*/latin.yml\?") as missing:
        load_config(tmp_path / "latin.yaml", environ={})
    with pytest.raises(ConfigError, match=r"byte 18: the file is not UTF-8 text. Save it as UTF-8.") as encoded:
        load_config(latin, environ={})
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path, environ={})

    assert len(missing.value.problems) == len(encoded.value.problems) == 1


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())

    assert load_config(path, environ={}).config.model.name == "demo"


def test_a_misspelt_profile_is_answered_with_the_near_one(tmp_path: Path) -> None:
    assert problems_of(tmp_path, profile="chatt") == ["profile chatt: there is no such profile. Did you mean chat?"]


def test_an_empty_section_is_the_same_as_none(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "lora:\n").config.lora.rank == 16


def test_unknown_sections_in_the_environment_and_after_set_are_refused(tmp_path: Path) -> None:
    environ, overrides = {"FT_TRAIN__EPOCHS": "1"}, ["trainin.epochs=1", "lora.rank=[1"]

    variable, override, broken = problems_of(tmp_path, environ=environ, overrides=overrides)

    assert variable == "train (environment variable FT_TRAIN__EPOCHS): unknown section. Did you mean training?"
    assert override == "trainin.epochs (--set): unknown section. Did you mean training?"
    assert broken.startswith("lora.rank = [1 (--set): not a YAML value: expected ',' or ']'")


def test_a_version_of_yaml_that_there_is_not_is_named(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text("model:\n%YAML 9.9\n---\n  name: m\n")
    with pytest.raises(ConfigError, match="%YAML line"):
        load_config(file, environ={})


def test_an_anchor_may_be_used_again(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text("model: {name: &x m}\ndata: {train_file: &x rows.jsonl}\n")

    assert load_config(file, environ={}).config.model.name == "m"


@pytest.mark.parametrize("how", ["file", "set", "environment"])
def test_text_that_is_not_utf_8_is_named_with_its_key(tmp_path, how):
    file = tmp_path / "run.yml"
    name = r'"\uDCE4"' if how == "file" else "m"
    file.write_text(f"model: {{name: {name}}}\ndata: {{train_file: rows.jsonl}}\n")
    environ = {"FT_MODEL__NAME": "\udce4"} if how == "environment" else {}
    overrides = ["model.name=\udce4"] if how == "set" else []
    with pytest.raises(ConfigError, match=r"model\.name = \\udce4 .*this is not UTF-8"):
        load_config(file, environ=environ, overrides=overrides)

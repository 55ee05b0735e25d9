"""Models that were made to hurt: refused by name, at once, with no code run and nothing written."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.ft import Ran
from tests.support.hostile_models import (
    CONFIGS,
    OWN_CODE,
    PICKLED,
    TEMPLATES,
    TOKENIZERS,
    TRAP,
    WEIGHTS,
    Break,
    write_pickled,
)
from tests.support.in_process import ft_here
from tests.support.tiny_model import CHATML, write_tiny_adapter, write_tiny_model
from tests.support.tiny_run import write_rows

SECONDS = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that works, and rows."""
    folder = tmp_path_factory.mktemp("bad-models")
    write_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the model to break."""
    shutil.copytree(whole / "model", tmp_path / "model")
    shutil.copy(whole / "rows.jsonl", tmp_path)
    return tmp_path


def commands(place: Path, backend: str) -> dict[str, tuple[object, ...]]:
    """The commands that read a model. What they write, if anything, is `place / "run"` or `place / "out"`."""
    model, rows = place / "model", place / "rows.jsonl"
    config = place / "run.yml"
    config.write_text(f"model: {{name: {model}, backend: {backend}}}\ndata: {{train_file: {rows}}}\n")
    short = ("--max-steps", 1, "--backend", backend)
    return {
        "train": ("train", "start", model, rows, "--output", place / "run", *short),
        "validate": ("train", "validate", config),
        "generate": ("generate", "--model", model, "--prompt", "Hi", "--max-tokens", 2, "--backend", backend),
        "info": ("models", "info", model),
    }


def contents(place: Path) -> set[Path]:
    return set(place.rglob("*"))


def require_refusal(place: Path, command: tuple[object, ...], named: str) -> Ran:
    before, began = contents(place), time.process_time()
    ran = ft_here(*command)

    assert ran.code in {1, 2}, ran
    assert time.process_time() - began < SECONDS
    assert named in ran.err, ran.err
    assert "Traceback" not in ran.err
    assert "fault in finetune" not in ran.err, ran.err
    assert contents(place) == before
    assert not (place / TRAP).exists()
    return ran


def cases(table: Mapping[str, Any]) -> Any:
    return pytest.mark.parametrize("broken", [pytest.param(value, id=name) for name, value in table.items()])


@cases(PICKLED | OWN_CODE | WEIGHTS)
def test_weights_that_are_programs_or_no_weights(place: Path, broken: Break) -> None:
    broken(place / "model")
    for name, command in commands(place, "mlx").items():
        if name != "info" or broken is not WEIGHTS["another name"]:  # which only the architecture tells
            require_refusal(place, command, str(place / "model"))


@pytest.mark.parametrize("backend", ["mlx", "pytorch"])
@cases(CONFIGS)
def test_a_config_json_that_no_model_has(place: Path, broken: Break, backend: str) -> None:
    broken(place / "model")
    asked = commands(place, backend)
    for name in ("validate", "generate"):
        require_refusal(place, asked[name], "")


@cases(TOKENIZERS)
def test_a_tokenizer_that_is_none(place: Path, broken: Break) -> None:
    broken(place / "model")
    asked = commands(place, "pytorch")
    for name in ("train", "validate"):
        require_refusal(place, asked[name], "")


@cases(TEMPLATES)
def test_a_template_that_would_run_long_or_reach_out(place: Path, broken: str) -> None:
    settings = json.loads((place / "model" / "tokenizer_config.json").read_text())
    (place / "model" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": broken}))
    asked = commands(place, "mlx")
    for name in ("train", "generate"):
        require_refusal(place, asked[name], "`tokenizer`")


@pytest.mark.parametrize("name", ["nested loops", "10^9 characters by joining", "globals"])
def test_such_a_template_is_refused_wherever_it_stands(place: Path, name: str) -> None:
    asked = commands(place, "mlx")
    file = place / "hostile.jinja"
    file.write_text(TEMPLATES[name])
    require_refusal(place, (*asked["train"], "--template", file), str(file))
    shown = ("dataset", "template", file, "--tokenizer", place / "model")
    assert ft_here(*shown).code in {1, 2}
    (place / "model" / "chat_template.jinja").write_text(TEMPLATES[name])
    require_refusal(place, asked["train"], "`tokenizer`")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapters.npz"])
def test_a_pickled_adapter(place: Path, name: str) -> None:
    adapter = write_tiny_adapter(place / "adapter", base=str(place / "model"))
    (adapter / "adapter_model.safetensors").unlink()
    write_pickled(adapter / name, place / TRAP)
    ask = ("--model", place / "model", "--adapter", adapter, "--prompt", "Hi")
    require_refusal(place, ("generate", *ask), str(adapter))
    require_refusal(place, ("export", adapter, "--format", "merged", "--output", place / "out"), str(adapter))


def test_the_model_that_is_broken_here_works_when_it_is_whole(place: Path) -> None:
    for command in commands(place, "mlx").values():
        ran = ft_here(*command)
        assert ran.code == 0, ran.err
    assert CHATML in json.loads((place / "model" / "tokenizer_config.json").read_text())["chat_template"]

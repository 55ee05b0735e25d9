"""`ft harness`: what the harness is given and what is shown of its report; with the real one where it is installed."""

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.support.in_process import ft_here as ft
from tests.support.quantised import quantise
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_run

from finetune.models.weights import read_weights
from finetune.workflows import harness as workflow

INSTALLED = find_spec("lm_eval") is not None
REPORT = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.25},
        "gsm": {"exact_match,strict-match": 1.0, "exact_match_stderr,strict-match": "N/A"},
    },
    "versions": {"arc": 1.0, "gsm": 3.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return tiny_run(root, write_tiny_model(root / "model"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A harness that notes what it was asked and which files the model had, and knows the tasks arc and gsm."""
    seen: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            seen["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in REPORT["results"]]

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        directory = Path(arguments["model_args"]["pretrained"])
        seen.update(arguments, directory=directory, files={path.name for path in directory.iterdir()})
        seen["config"] = json.loads((directory / "config.json").read_text())
        seen["types"] = [tensor.dtype for tensor in read_weights(directory)]
        return REPORT

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.__spec__ = ModuleSpec("lm_eval", None)
    package.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(workflow, "_version", lambda: "0")
    return seen


def test_the_harness_gets_one_merged_model_that_is_gone_afterwards(
    run: Path, asked: dict[str, Any], tmp_path: Path
) -> None:
    written = tmp_path / "report.json"
    ran = ft("harness", run, "--tasks", "arc, gsm", "--limit", 3, "--few-shot", 0, "--output", written)
    assert ran.code == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= asked["files"]
    assert not asked["directory"].exists()
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["arc", "gsm"], 3, 0)
    assert [line.split() for line in ran.out.splitlines()[1:]] == [
        ["arc", "acc", "0.5000", "±", "0.2500"],
        ["gsm", "exact_match", "(strict-match)", "1.0000"],
    ]
    assert json.loads(written.read_text()) == REPORT


def test_a_model_is_measured_where_it_lies(run: Path, asked: dict[str, Any]) -> None:
    model = run.parent / "model"
    ran = ft("harness", "--model", model, "--tasks", "arc", "--json")
    assert asked["directory"] == model
    assert ran.json["figures"][0] == {"task": "arc", "metric": "acc", "value": 0.5, "error": 0.25}


def test_a_run_on_a_base_that_mlx_has_packed_is_given_as_floats(asked: dict[str, Any], tmp_path: Path) -> None:
    packed = quantise(write_tiny_model(tmp_path / "float"), tmp_path / "packed")
    run = tiny_run(tmp_path / "work", packed)
    for what in (run, run / "adapter"):
        ran = ft("harness", what, "--tasks", "arc")
        assert ran.code == 0, ran.err
        assert "quantization" not in asked["config"]
        assert set(asked["types"]) == {"F32"}
    ran = ft("harness", "--model", packed, "--tasks", "arc")
    assert (ran.code, "its weights are packed for MLX" in ran.err) == (2, True)


def test_wrong_requests_say_what_is_wrong(run: Path, asked: dict[str, Any], tmp_path: Path) -> None:
    wrong: list[tuple[list[object], str]] = [
        ([run, "--tasks", "arc,other"], "no task other"),
        ([run, "--tasks", ","], "--tasks is empty"),
        ([run, "--tasks", "arc", "--limit", 0], "--limit 0"),
        ([run, "--tasks", "arc", "--few-shot", -1], "--few-shot -1"),
        ([run, "--tasks", "arc", "--tasks-from", tmp_path / "none"], "not a directory"),
        ([run, "--tasks", "arc", "--output", tmp_path / "none" / "report.json"], "does not exist"),
        (["--tasks", "arc"], "Nothing to load"),
    ]
    for arguments, message in wrong:
        ran = ft("harness", *arguments)
        assert (ran.code, message in ran.err) == (2, True), (arguments, ran)
    assert "files" not in asked


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_it_says_how_to_install_it(run: Path) -> None:
    ran = ft("harness", run, "--tasks", "arc")
    assert (ran.code, "pip install 'lm_eval[hf]'" in ran.err) == (2, True)


@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed")
def test_the_real_harness_measures_a_task_from_a_file(run: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Say {word}", "choices": [word.upper(), "NO"], "gold": 0} for word in ("red", "one")]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nnum_fewshot: 0\n'
    )
    ran = ft("harness", run, "--tasks", "colours", "--tasks-from", tmp_path, "--device", "cpu", "--json")
    assert ran.code == 0
    assert {figure["metric"] for figure in ran.json["figures"]} >= {"acc"}

"""Which configuration a command line asks for. The training itself is replaced."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import pytest

from finetune.cli import main
from finetune.config.load import LoadedConfig

FILE = "model:\n  name: file-model\ndata:\n  train_file: file.jsonl\ntraining:\n  batch_size: 7\n"


class Workflow:
    """Stands in for the training workflow and notes what it was asked to do."""

    def __init__(self) -> None:
        self.loaded: LoadedConfig | None = None
        self.resumed: Path | None = None
        self.overrides: list[str] = []
        self.final_eval: float | None = 0.3

    def train(self, config: LoadedConfig, *, listeners: Sequence[Any], resume: Path | None = None) -> SimpleNamespace:
        self.loaded, self.resumed = config, resume
        print("a library says something")
        return self.result()

    def resume(self, path: Path, *, overrides: Sequence[str], listeners: Sequence[Any]) -> SimpleNamespace:
        self.resumed, self.overrides = path, list(overrides)
        return self.result()

    def result(self) -> SimpleNamespace:
        evaluation = {"initial_eval_loss": 2.0, "best_eval_loss": 0.25, "final_eval_loss": self.final_eval}
        return SimpleNamespace(
            run_dir=Path("outputs/r"),
            final_loss=0.5,
            perplexity=1.65,
            training_time=2.0,
            peak_memory_gb=0.1,
            metrics={"final_loss": 0.5, **evaluation},
        )

    def value(self, key: str) -> Any:
        assert self.loaded is not None
        return self.loaded.value(key)


class SilentListener:
    def __init__(self, **_: object) -> None: ...
    def __enter__(self) -> "SilentListener":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None: ...


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workflow:
    found = Workflow()
    training, console = ModuleType("finetune.workflows.train"), ModuleType("finetune.tracking.console")
    training.train, training.resume = found.train, found.resume  # type: ignore[attr-defined]
    console.ConsoleListener = SilentListener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, training.__name__, training)
    monkeypatch.setitem(sys.modules, console.__name__, console)
    monkeypatch.chdir(tmp_path)
    return found


def write_default(text: str = FILE) -> None:
    Path("config").mkdir()
    Path("config/train.yml").write_text(text, encoding="utf-8")


def test_start_passes_every_flag_on(workflow: Workflow) -> None:
    flags = "--template chatml --epochs 5 --max-steps 9 --batch-size 2 --learning-rate 1e-3 --lora-rank 8 --method lora"
    more = "--max-length 99 --output out --seed 3 --set lora.alpha=4 --set lora.dropout=0.1 --profile code"

    assert main.run(["train", "start", "m", "d.jsonl", *flags.split(), *more.split()]) == 0

    expected = {
        "model.name": "m", "data.train_file": "d.jsonl", "data.template": "chatml", "training.epochs": 5.0,
        "training.max_steps": 9, "training.batch_size": 2, "training.learning_rate": 1e-3, "lora.rank": 8,
        "training.method": "lora", "data.max_length": 99, "output.output_dir": "out", "training.seed": 3,
        "lora.alpha": 4.0, "lora.dropout": 0.1, "data.on_long": "drop",
    }  # fmt: skip
    assert {key: workflow.value(key) for key in expected} == expected


def test_start_takes_the_rest_from_a_file(workflow: Workflow) -> None:
    Path("my.yml").write_text(FILE, encoding="utf-8")

    main.run(["train", "start", "m", "d.jsonl", "--config", "my.yml"])

    assert (workflow.value("model.name"), workflow.value("training.batch_size")) == ("m", 7)


def test_bare_train_reads_the_usual_file(workflow: Workflow) -> None:
    write_default()

    assert main.run(["train"]) == 0
    assert workflow.value("model.name") == "file-model"


def test_bare_train_without_a_file_says_what_to_give(workflow: Workflow, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train"]) == 2
    assert "There is no config/train.yml here" in capsys.readouterr().err
    assert workflow.loaded is None


def test_model_and_data_need_no_file_and_say_when_one_is_left_unread(
    workflow: Workflow, capsys: pytest.CaptureFixture[str]
) -> None:
    write_default("not: [read")

    assert main.run(["train", "--model", "m", "--data", "d.jsonl"]) == 0
    assert workflow.value("training.batch_size") == 4
    assert "config/train.yml is not read" in capsys.readouterr().err


def test_quick_is_short_and_still_the_persons_to_change(workflow: Workflow) -> None:
    main.run(["train", "quick", "m", "d.jsonl", "--set", "lora.rank=2"])

    assert (workflow.value("training.max_steps"), workflow.value("lora.rank")) == (50, 2)


def test_resume_alone_takes_everything_from_the_run(workflow: Workflow) -> None:
    write_default()

    assert main.run(["train", "--resume", "outputs/r", "--set", "output.eval_steps=5"]) == 0
    assert (workflow.resumed, workflow.loaded) == (Path("outputs/r"), None)
    assert workflow.overrides == ["output.eval_steps=5"]


def test_resume_with_a_configuration_passes_both(workflow: Workflow) -> None:
    assert main.run(["train", "start", "m", "d.jsonl", "--resume", "outputs/r"]) == 0
    assert workflow.resumed == Path("outputs/r")
    assert workflow.value("model.name") == "m"


def test_an_option_before_the_command_is_refused(workflow: Workflow, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", "--profile", "chat", "start", "m", "d.jsonl"]) == 2
    assert "--profile before `start` has no effect. Put it after" in capsys.readouterr().err


@pytest.mark.parametrize(("final_eval", "shown"), [(0.3, True), (None, False)])
def test_a_person_sees_what_changed_and_what_to_do_next(
    workflow: Workflow, capsys: pytest.CaptureFixture[str], final_eval: float | None, shown: bool
) -> None:
    workflow.final_eval = final_eval

    main.run(["train", "start", "m", "d.jsonl"])

    out = capsys.readouterr().out
    assert ("loss 2.0000 before, 0.2500 at best" in out) is shown
    assert "Next: ft evaluate outputs/r" in out


def test_json_is_one_document_with_the_report(workflow: Workflow, capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["train", "start", "m", "d.jsonl", "--json"])

    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (document["run_dir"], document["final_loss"]) == ("outputs/r", 0.5)
    assert "a library says something" in shown.err


def test_wrong_values_name_the_flag(workflow: Workflow, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", "start", "m", "d.jsonl", "--learning-rate", "-1", "--method", "lroa"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "The configuration has 2 problems:",
        "  training.method = lroa (--method): must be one of lora, dora, full. Did you mean lora?",
        "  training.learning_rate = -1.0 (--learning-rate): must be greater than 0.",
    ]


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "finetune configuration"

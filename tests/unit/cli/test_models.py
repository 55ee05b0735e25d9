"""`ft models`: the table for people, the document for machines."""

import json
from pathlib import Path

import pytest
from tests.support.model_files import write_model

from finetune.cli import main

Captured = pytest.CaptureFixture[str]


def test_info_shows_sizes_and_what_tuning_takes(tmp_path: Path, capsys: Captured) -> None:
    assert main.run(["models", "info", str(write_model(tmp_path)), "--rank", "2"]) == 0

    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert shown["architecture"].endswith("llama")
    assert shown["LoRA, rank 2"].endswith("20 trainable parameters (25.00%) in 1 linear modules")
    assert "memory, LoRA" not in shown  # this config.json gives no sizes


def test_info_shows_the_peak_of_tuning_the_carried_model(capsys: Captured) -> None:
    assert main.run(["models", "info", "demo"]) == 0

    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert shown["memory, LoRA"].endswith("at the peak of steps of 4 rows of 512 tokens")
    assert "about " in shown["memory, full"]


def test_info_as_json_has_the_same_figures(tmp_path: Path, capsys: Captured) -> None:
    main.run(["models", "info", str(write_model(tmp_path)), "--rank", "2", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 60
    assert found["lora"] == {
        "rank": 2, "modules": 1, "trainable": 20, "frozen": 60, "total": 80, "share": 0.25, "adapter_bytes": 80
    }  # fmt: skip
    assert found["memory_bytes"] is None


def test_list_shows_what_lies_in_a_directory(tmp_path: Path, capsys: Captured) -> None:
    model = write_model(tmp_path / "models" / "tiny")

    main.run(["models", "list", str(tmp_path / "models")])
    table = capsys.readouterr().out
    main.run(["models", "list", str(model), "--json"])
    document = json.loads(capsys.readouterr().out)

    assert [line.split() for line in table.splitlines() if str(model) in line] == [
        [str(model), "directory", "llama", "60", "240", "bytes"]
    ]
    assert [entry["parameters"] for entry in document["models"] if entry["origin"] == "directory"] == [60]


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert main.run(["models", "list", str(tmp_path / "none")]) == 2
    assert f"There is no directory {tmp_path / 'none'}." in capsys.readouterr().err

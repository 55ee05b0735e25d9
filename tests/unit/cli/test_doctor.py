"""What `ft doctor` says about a machine, with an engine that stands in for MLX."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from finetune.core.errors import UsageError
from finetune.engines.base import EngineInfo
from finetune.workflows import doctor

Captured = pytest.CaptureFixture[str]


def engine_that(monkeypatch: pytest.MonkeyPatch, info: EngineInfo | Exception) -> None:
    def tell() -> EngineInfo:
        if isinstance(info, Exception):
            raise info
        return info

    registry: Any = ModuleType("finetune.engines.registry")
    registry.choose_engine = lambda _: SimpleNamespace(info=tell)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)


WORKING = EngineInfo("mlx", "0.0.1", "cpu", {"blas": "reference"}, advice=("Install OpenBLAS: apt install x",))


def test_a_machine_that_works_is_ready(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engine_that(monkeypatch, WORKING)

    assert main.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "0.0.1 on cpu" in shown
    assert "Install OpenBLAS: apt install x" in shown
    assert "Ready to train." in shown


def test_json_is_one_document_with_everything(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engine_that(monkeypatch, WORKING)

    main.run(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)

    assert found["ok"] is True
    assert found["engines"][0]["details"] == {"blas": "reference"}
    assert found["memory"]["total_bytes"] > 0
    assert {"python", "platform", "cpu", "disk", "libraries", "hugging_face"} <= set(found)


def test_an_engine_that_does_not_start_is_a_problem_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    engine_that(monkeypatch, UsageError("mlx is not installed. Run: pip install mlx"))

    assert main.run(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "The mlx engine does not start: mlx is not installed. Run: pip install mlx" in shown
    assert "Something is in the way of training." in shown


def test_a_missing_library_is_a_problem_and_a_missing_extra_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that(monkeypatch, WORKING)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("numpy", "pyarrow") else "1.0")

    found = doctor.examine()

    assert found.problems == ["numpy is not installed. Install finetune again: pip install finetune"]
    assert any(sentence.startswith("pyarrow is not installed; it reads Parquet files") for sentence in found.advice)


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that(monkeypatch, WORKING)
    limits = {"memory.max": "1000000000", "cpu.max": "100000 100000"}
    monkeypatch.setattr(doctor, "_cgroup", limits.get)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(doctor.sys, "platform", "linux")

    found = doctor.examine()

    assert found.memory["container_limit_bytes"] == 1_000_000_000
    assert found.cpu["cores"] == 1
    assert any("Only 1.0 GB of memory are free" in sentence for sentence in found.advice)


def test_little_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine_that(monkeypatch, WORKING)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9, total=2e9))

    assert any("Only 1.0 GB are free on this disk" in sentence for sentence in doctor.examine(tmp_path).advice)

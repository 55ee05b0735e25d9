"""What `ft doctor` says about a machine, with engines that stand in for the real ones."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from finetune.config.schema import ModelConfig
from finetune.core import machine
from finetune.core.errors import UsageError
from finetune.core.types import Dtype
from finetune.engines.base import EngineInfo
from finetune.engines.registry import EngineChoice
from finetune.hub import client
from finetune.workflows import doctor, self_test
from finetune.workflows.self_test import Promise

Captured = pytest.CaptureFixture[str]


class StandIn:
    """An engine that says what it is given, and multiplies at a rate of its own."""

    def __init__(self, info: EngineInfo, rate: float | Exception = 2e11) -> None:
        self._info, self._rate = info, rate

    def info(self) -> EngineInfo:
        return self._info

    def compute_dtype(self, model: ModelConfig, stored: Dtype) -> Dtype:
        return stored

    def matmul_rate(self, dtype: Dtype) -> float:
        if isinstance(self._rate, Exception):
            raise self._rate
        return self._rate


def engines_are(monkeypatch: pytest.MonkeyPatch, **engines: StandIn | Exception) -> None:
    """Only these are installed; an exception is what loading one raises. The first is what `auto` chooses."""

    def load(choice: EngineChoice) -> Any:
        found = engines[choice.name]
        if isinstance(found, Exception):
            raise found
        return found

    first: Any = next(iter(engines))
    monkeypatch.setattr(doctor, "is_installed", lambda name: name in engines)
    monkeypatch.setattr(doctor, "load_engine", load)
    monkeypatch.setattr(doctor, "choose", lambda _: EngineChoice(first, "auto: the faster one here"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "is_reachable", lambda: True)


MLX = StandIn(EngineInfo("mlx", "0.0.1", "cpu", {"blas": "reference"}, advice=("Install OpenBLAS: apt install x",)))
TORCH = StandIn(EngineInfo("pytorch", "2.0.0", "cpu (AVX512)", {}), rate=4.4e11)


def test_a_slow_product_is_not_shown_as_none(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engines_are(monkeypatch, mlx=StandIn(MLX.info(), rate=4.2e8))

    assert main.run(["doctor"]) == 0
    assert "GFLOP/s of a matrix product: 0.4 in float32" in capsys.readouterr().out


def test_a_machine_that_works_is_ready(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engines_are(monkeypatch, pytorch=TORCH, mlx=MLX)

    assert main.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "pytorch (auto: the faster one here)" in shown
    assert "2.0.0 on cpu (AVX512); GFLOP/s of a matrix product: 440 in float32, 440 in bfloat16" in shown
    assert "computes 16-bit models in bfloat16" in shown
    assert "0.0.1 on cpu" in shown
    assert "Install OpenBLAS: apt install x" in shown
    assert "Ready to train." in shown


def test_json_is_one_document_with_everything(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engines_are(monkeypatch, mlx=MLX)

    main.run(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)

    assert found["ok"] is True
    assert found["engine"] == {"name": "mlx", "reason": "auto: the faster one here"}
    chosen, other = found["engines"]
    assert (chosen["chosen"], chosen["details"]) == (True, {"blas": "reference"})
    assert chosen["matmul_gflops"] == {"float32": 200.0, "bfloat16": 200.0}
    assert (other["name"], other["available"], other["chosen"]) == ("pytorch", False, False)
    assert found["memory"]["total_bytes"] > 0
    assert {"python", "platform", "cpu", "disk", "libraries", "hugging_face"} <= set(found)


def test_an_engine_that_is_not_installed_is_advice_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    engines_are(monkeypatch, mlx=MLX)

    assert main.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "The pytorch engine is not there: torch is not installed." in shown
    assert "pip install 'finetune[torch]'" in shown


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (UsageError("mlx is not installed. Run: pip install mlx"), "mlx is not installed. Run: pip install mlx"),
        (StandIn(EngineInfo("mlx", "0.0.1", "cpu", {}), rate=RuntimeError("no kernel")), "no kernel"),
    ],
)
def test_the_chosen_engine_that_does_not_start_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, broken: Any, said: str
) -> None:
    engines_are(monkeypatch, mlx=broken, pytorch=TORCH)

    assert main.run(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert f"The mlx engine does not start: {said}" in shown
    assert "Something is in the way of training." in shown


def test_another_engine_that_does_not_start_is_advice(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engines_are(monkeypatch, pytorch=TORCH, mlx=OSError("libfoo.so: cannot open shared object file"))

    assert main.run(["doctor"]) == 0
    assert "The mlx engine does not start: libfoo.so" in capsys.readouterr().out


def test_a_missing_library_is_a_problem_and_a_missing_extra_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    engines_are(monkeypatch, mlx=MLX)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("numpy", "pyarrow") else "1.0")

    found = doctor.examine()

    assert found.problems == ["numpy is not installed. Install finetune again: pip install finetune"]
    assert any(sentence.startswith("pyarrow is not installed; it reads Parquet files") for sentence in found.advice)


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engines_are(monkeypatch, mlx=MLX)
    limits = {"memory.max": "1000000000", "memory.current": "5000000", "cpu.max": "100000 100000"}
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text("0::/\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")

    found = doctor.examine()

    assert found.memory["container_limit_bytes"] == 1_000_000_000
    assert found.cpu["cores"] == 1
    assert any("Only 1.0 GB of memory are free" in sentence for sentence in found.advice)


def test_little_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engines_are(monkeypatch, mlx=MLX)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9, total=2e9))

    assert any("Only 1.0 GB are free on this disk" in sentence for sentence in doctor.examine(tmp_path).advice)


def test_a_hub_that_cannot_be_reached_is_advice(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    engines_are(monkeypatch, mlx=MLX)
    monkeypatch.setattr(client, "is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when the library is imported

    assert main.run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "cannot be reached, with" in shown
    assert "models can be tuned from the cache and from directories only" in shown


@pytest.mark.parametrize(
    ("kept", "code", "said"), [(True, 0, "All 1 promises are kept"), (False, 1, "1 of 1 promises")]
)
def test_a_broken_promise_is_told_and_leaves_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, kept: bool, code: int, said: str
) -> None:
    engines_are(monkeypatch, mlx=MLX)
    promise = Promise("it counts", "mlx", kept, "2 + 2 = 4", 0.1)

    def tried(on_promise: Any) -> list[Promise]:
        on_promise(promise)
        return [promise]

    monkeypatch.setattr(self_test, "self_test", tried)
    assert main.run(["doctor", "--self-test"]) == code
    shown = capsys.readouterr().out
    assert said in shown
    assert "mlx: it counts" in shown
    assert main.run(["doctor", "--self-test", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["self_test"][0]["kept"] is kept

"""The self-test of `ft doctor` with the real engines: it keeps what it says, and notices what is broken."""

import time
from typing import Any

import numpy as np
import pytest

from finetune.engines.mlx.engine import MLXEngine
from finetune.engines.mlx.train import MLXTrainSession
from finetune.workflows import self_test


def test_every_promise_is_kept_on_both_engines_in_a_minute() -> None:
    start = time.process_time()
    found = self_test.self_test()
    assert time.process_time() - start < 60
    assert [promise for promise in found if not promise.kept] == []
    assert {promise.engine for promise in found} == {"mlx", "pytorch", "mlx and pytorch"}
    assert len(found) == 7


@pytest.fixture
def mlx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "is_installed", lambda name: name == "mlx")


def broken() -> list[str]:
    return [promise.promise.split()[0:2][-1] for promise in self_test.self_test() if not promise.kept]


@pytest.mark.usefixtures("mlx_alone")
def test_a_loss_that_depends_on_the_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step: Any = MLXTrainSession.step

    def averaged(self: Any, micro_batches: Any, *, learning_rate: float) -> Any:
        return step(self, micro_batches[:1], learning_rate=learning_rate)

    monkeypatch.setattr(MLXTrainSession, "step", averaged)
    assert broken() == ["loss"]


@pytest.mark.usefixtures("mlx_alone")
def test_a_resume_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLXTrainSession, "load_state", lambda self, directory: None)
    assert broken() == ["run"]


@pytest.mark.usefixtures("mlx_alone")
def test_an_adapter_that_is_read_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = self_test.write_mlx_lm

    def scaled(directory: Any, adapter: Any, *, layers: Any) -> Any:
        for update in adapter.updates.values():
            np.multiply(update.b, np.float32(1.01), out=update.b)
        return write(directory, adapter, layers=layers)

    monkeypatch.setattr(self_test, "write_mlx_lm", scaled)
    assert broken() == ["adapter"]


@pytest.mark.usefixtures("mlx_alone")
def test_an_engine_that_fails_breaks_its_promises_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(MLXEngine, "open_training", fail)
    found = self_test.self_test()
    assert [promise.kept for promise in found] == [False] * 3
    assert all("no kernel" in promise.detail for promise in found)

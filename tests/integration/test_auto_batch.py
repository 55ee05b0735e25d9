"""`batch_size: auto`: a run that repeats and resumes, and that fits in the memory there is."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import write_rows

from finetune.config.load import load_config
from finetune.core.errors import TrainingError
from finetune.core.events import Event
from finetune.core.types import Batch
from finetune.engines.base import Engine
from finetune.planning.probe import NotTaken, ProbedRun
from finetune.workflows import auto_batch
from finetune.workflows.train import resume, train

ROWS = [{"prompt": f"Say {'very ' * (number % 7)}{number}", "completion": str(number)} for number in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model")


def flags(model: Path, data: Path, output: Path, engine: Engine) -> dict[str, Any]:
    return {
        "model.name": str(model), "model.backend": engine.name, "model.dtype": "float32",
        "data.train_file": str(data), "data.validation_split": 0.2, "lora.rank": 4, "lora.dropout": 0.1,
        "training.batch_size": "auto", "training.gradient_accumulation_steps": 2, "training.max_steps": 4,
        "output.sample_prompts": 0, "output.output_dir": str(output),
    }  # fmt: skip


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = adapter(one), adapter(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_an_auto_run_its_resolved_config_and_its_resumption_end_in_the_same_bits(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    said: list[Event] = []
    config = load_config(None, environ={}, flags=flags(model, data, tmp_path / "auto", engine))

    train(config, listeners=[said.append])

    resolved = load_config(tmp_path / "auto" / "config.yml", environ={}).config.training
    assert (resolved.batch_size, resolved.gradient_accumulation_steps) == (8, 1)
    assert any("training.batch_size=auto: 8 rows a step" in getattr(event, "message", "") for event in said)
    again = load_config(
        tmp_path / "auto" / "config.yml", environ={}, flags={"output.output_dir": str(tmp_path / "again")}
    )
    train(again)
    assert same(tmp_path / "auto", tmp_path / "again")
    train(config, resume=tmp_path / "auto")  # what auto came to is taken from the run
    resume(tmp_path / "auto")


def test_a_probe_that_fails_leads_to_a_smaller_cut_and_at_last_to_an_error(
    engine: Engine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    tried: list[int | None] = []

    def probe(run: ProbedRun, batches: Sequence[Batch], *, leave: int) -> NotTaken:
        tried.append(run.training.max_batch_tokens)
        return NotTaken("the system ended it (SIGKILL)", for_memory=True)

    monkeypatch.setattr(auto_batch, "probe", probe)
    with pytest.raises(TrainingError, match=r"even one row at a time.*ended it \(SIGKILL\).* Lower data\.max_length"):
        train(load_config(None, environ={}, flags=flags(model, data, tmp_path / "auto", engine)))
    assert tried[0] is None
    assert len(tried) > 2
    assert not (tmp_path / "auto").exists()


def test_under_a_limit_of_address_space_a_run_is_cut_to_fit(engine: Engine, tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("RLIMIT_AS is not kept on this system")
    script = Path(__file__).parents[2] / "benchmarks" / "auto_batch.py"
    out = tmp_path / "found.json"
    limit = {"mlx": "1200", "pytorch": "200"}[engine.name]
    command = [sys.executable, str(script), "--engine", engine.name, "--limits", limit, "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [found] = json.loads(out.read_text())
    assert "failed" not in found, found
    assert 0.5 <= found["share"] <= 1.0
    assert found["max_batch_tokens"] is not None

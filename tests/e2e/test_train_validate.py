"""`ft train validate`: everything is checked and counted before a weight is loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.ft import ft
from tests.support.in_process import ft_here
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration over a small model and twenty short rows."""
    model = write_tiny_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"say {n}", "completion": f"{n}"}) for n in range(20)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    file = tmp_path / "run.yml"
    text = f"model:\n  name: {model}\nlora:\n  rank: 2\ndata:\n  train_file: {rows}\n  template: chatml\n"
    file.write_text(text, encoding="utf-8")
    return file


def test_rows_steps_and_memory_are_counted(config: Path) -> None:
    ran = ft("train", "validate", config, "--set", "training.epochs=2", "--json")

    assert ran.code == 0, ran.err
    found: dict[str, Any] = ran.json
    assert (found["train_rows"], found["validation_rows"]) == (18, 2)
    # 18 rows in steps of 4 are 5 steps, the last of 2 rows; two epochs are 10.
    assert (found["steps_per_epoch"], found["steps"]) == (5, 10)
    # Rank 2 on two layers of 4 modules [32, 32] and 3 of [32, 48]; the base has 34,272 parameters of 4 bytes.
    trainable, parts = found["trainable_parameters"], found["memory"]["parts"]
    assert (trainable, parts["weights"]) == (2 * 2 * (4 * 64 + 3 * 80), 4 * 34_272)
    assert (parts["trained"], parts["optimizer"]) == (8 * trainable, 8 * trainable)
    assert found["memory"]["predicted_bytes"] > sum(parts.values()) - parts["libraries"]
    assert found["sources"]["lora.rank"] == "run.yml:4"


def test_a_person_gets_a_table_and_advice(config: Path) -> None:
    ran = ft_here("train", "validate", config, "--set", "lora.alpha=64")

    assert ran.code == 0, ran.err
    assert "20 read, 18 to train on, 2 to validate on" in ran.out
    assert re.search(r"evaluation +2 rows, 9 times", ran.out)
    assert "lora.alpha = 64 is far from 2 x rank (4)" in ran.out
    assert "The configuration and the data are in order." in ran.out


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("lora.rank=40", 2, "lora.rank=40 is more than the width 32 of q_proj"),
        ("lora.target_modules=[qproj]", 2, "Did you mean q_proj?"),
        ("data.train_file=none.jsonl", 1, "none.jsonl"),
        ("model.name=none", 1, "none is neither a directory nor a model in the Hugging Face cache"),
        ("training.learning_rate=-1", 2, "training.learning_rate = -1 (--set): must be greater than 0."),
    ],
)
def test_what_a_run_would_trip_over_is_found(config: Path, override: str, code: int, said: str) -> None:
    ran = ft_here("train", "validate", config, "--set", override)

    assert said in ran.err
    assert ran.code == code
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("missing", ["data.train_file", "data.validation_file", "model.name"])
def test_what_is_missing_is_said_before_an_engine_is_imported(config: Path, missing: str) -> None:
    arguments = ["train", "validate", str(config), "--set", f"{missing}=none", "--set", "model.backend=pytorch"]
    code = f"import sys; from finetune.cli.main import run; print(run({arguments!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert done.stdout.split() == ["1", "False"], done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_directory_that_is_in_use_is_found(config: Path) -> None:
    ran = ft_here("train", "validate", config, "--set", f"output.output_dir={config.parent}")

    assert ran.code != 0
    assert str(config.parent) in ran.err

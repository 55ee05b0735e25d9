"""A short real run on a tiny model: enough that the tuned model differs from its base."""

import json
from pathlib import Path
from typing import Any

from finetune.config.load import load_config
from finetune.workflows.train import train

WORDS = ("red", "green", "blue", "one", "two", "three", "four", "five")
ROWS = [{"prompt": f"Say {word}", "completion": word.upper()} for word in WORDS]


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    return path


def tiny_run(
    root: Path,
    model: Path,
    *,
    method: str = "lora",
    init: str = "pretrained",
    quantization: str | None = None,
    rows: list[dict[str, Any]] | None = None,
) -> Path:
    """Train on a few rows and return the run's directory, which lies in `root` beside its data."""
    root.mkdir(parents=True, exist_ok=True)
    flags = {
        "model.name": str(model),
        "model.init": init,
        "model.quantization": quantization,
        "data.train_file": str(write_rows(root / "rows.jsonl", rows)),
        "data.validation_split": 0.3,
        "training.method": method,
        "training.max_steps": 6,
        "training.learning_rate": 0.02 if method == "lora" else 0.005,
        "lora.rank": 4 if method == "lora" else None,
        "output.eval_steps": 3,
        "output.sample_prompts": 0,
        "output.output_dir": str(root / "run"),
    }
    train(load_config(None, environ={}, flags=flags))
    return root / "run"

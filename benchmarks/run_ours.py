"""One run of this project, as a person would start it. Prints one JSON line."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import StepClock
from finetune.core.events import Event, StepCompleted


def settings(arguments: argparse.Namespace, output: str) -> dict[str, dict[str, Any]]:
    """The common recipe: LoRA of rank 8 on all linear modules, four rows a step, AdamW at 1e-4."""
    return {
        "model": {"name": arguments.model, "backend": arguments.backend, "dtype": arguments.dtype},
        "lora": {"rank": 8, "alpha": 16},
        "data": {
            "train_file": arguments.data,
            "validation_split": 0.0,
            "max_length": 1024,
            "train_on_prompt": not arguments.masked,
        },
        "training": {
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup_steps": 0,
            "batch_size": arguments.batch,
            "gradient_accumulation_steps": 4 // arguments.batch,
            "epochs": 1,
            "method": arguments.method,
        },
        "output": {"output_dir": output, "sample_prompts": 0, "checkpoint_steps": 10**6},
    }


def parse(options: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or `options` in its place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--masked", action="store_true")
    return parser.parse_args(options)


def main() -> None:
    """Train on every row of the file once."""
    from finetune.workflows.train import train

    clock = StepClock()

    def listen(event: Event) -> None:
        if isinstance(event, StepCompleted):
            clock.step(event.loss)

    with tempfile.TemporaryDirectory() as folder:
        train(settings(parse(), str(Path(folder) / "run")), listeners=[listen])
    clock.report()


if __name__ == "__main__":
    main()

"""How time and memory grow with the length of rows, rows in memory, rank, and the number of rows in the file.

Each point is a process of its own: a process's peak memory never falls. The model is nano30.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import peak_memory_bytes

TOKENS_A_STEP = 2048
STEPS = 3
GRID: dict[str, tuple[int, ...]] = {
    "length": (64, 128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16),
    "rank": (4, 16, 64, 256),
    "rows": (100, 1_000, 10_000, 100_000),
}


def main(workload: Path, results: Path) -> None:
    """Measure every point on both engines."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for backend in ("pytorch", "mlx"):
        found[backend] = {}
        for axis, values in GRID.items():
            found[backend][axis] = [_in_a_process(workload, backend, axis, value) for value in values]
            points = (f"{p['value']:,}: {p['seconds']:.2f} s, {p['peak_gb']:.2f} GB" for p in found[backend][axis])
            print(backend, axis, "; ".join(points), flush=True)
    (results / "scaling.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _in_a_process(workload: Path, backend: str, axis: str, value: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", str(workload), backend, axis, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    point: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return point


def measure(workload: Path, backend: str, axis: str, value: int) -> dict[str, float]:
    """Seconds of one step (median), peak memory, and bytes of the optimizer's state."""
    from finetune.adapters.lora import seeded_init
    from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
    from finetune.engines.registry import choose_engine

    length = value if axis == "length" else 256
    rows_a_step = value if axis == "batch" else TOKENS_A_STEP // length
    rank = value if axis == "rank" else 8
    config = ModelConfig(name="nano30", backend=backend)
    steps = _steps(length, rows_a_step, rows=value if axis == "rows" else 64)
    session = choose_engine(config).open_training(
        workload / "nano30",
        model_config=config,
        training=TrainingConfig(),
        lora=LoraConfig(rank=rank),
        init=seeded_init(0),
    )
    seconds = []
    for number in range(STEPS):
        batches = steps(number)
        began = time.perf_counter()
        session.step(batches, learning_rate=1e-4).result()
        seconds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
        session.save_state(Path(folder))
        state = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "value": value,
        "seconds": float(np.median(seconds[1:])),
        "peak_gb": peak_memory_bytes() / 1e9,
        "state_mb": state / 1e6,
    }


def _steps(length: int, rows_a_step: int, *, rows: int) -> Any:
    """Steps of a plan over `rows` random rows of `length` tokens."""
    from finetune.data.batching import BatchPlan
    from finetune.data.rows import EncodedRow, Origin

    rng = np.random.default_rng(0)
    mask = np.ones(length + 1, np.bool_)
    mask[0] = False
    encoded = [
        EncodedRow(rng.integers(3, 8000, length + 1).astype(np.int32), mask, Origin("random", number + 1))
        for number in range(max(rows, rows_a_step))
    ]
    plan = BatchPlan(encoded, rows_per_step=rows_a_step, max_rows=rows_a_step, max_tokens=None, seed=0, pad_id=0)
    return plan.step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", type=Path)
    parser.add_argument("backend")
    parser.add_argument("axis", choices=GRID)
    parser.add_argument("value", type=int)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.workload, arguments.backend, arguments.axis, arguments.value)))

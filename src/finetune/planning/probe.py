"""Takes one step in a process of its own and says what memory it took: `python -m finetune.planning.probe FOLDER`.

A process of its own, because a step that does not fit may be killed, and because nothing of it must be left in the
run: no state of a session, no random numbers, no memory that the C library keeps.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Batch
from finetune.engines.registry import choose_engine

_REQUEST, _BATCHES, _ANSWER = "request.json", "batches.npz", "answer.json"
_FIELDS = ("inputs", "targets", "loss_mask", "positions", "segments")
_LARGE_LIBRARIES = ("torch", "transformers", "mlx_lm", "pyarrow")
_STEPS = 2  # the second has the optimizer's state in memory from its start


@dataclass(frozen=True, slots=True)
class ProbedRun:
    """What decides the memory of a step."""

    path: Path  # of the model
    model: ModelConfig
    training: TrainingConfig
    lora: LoraConfig
    spares: bool  # `Engine.spare_memory`


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes that the steps took, beyond those of the process before it loaded the model."""

    resident: int
    addresses: int
    arrays: int  # as the engine counts them


def probe(run: ProbedRun, batches: Sequence[Batch]) -> Taken | None:
    """Take a step with these micro-batches in another process; None where that process did not survive it."""
    with tempfile.TemporaryDirectory(prefix="finetune-probe-") as name:
        folder = Path(name)
        sections = {key: getattr(run, key).model_dump(mode="json") for key in ("model", "training", "lora")}
        request = {"path": str(run.path), "spares": run.spares, "batches": len(batches), **sections}
        request["libraries"] = [library for library in _LARGE_LIBRARIES if library in sys.modules]
        (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        arrays = {f"{number}-{key}": getattr(batch, key) for number, batch in enumerate(batches) for key in _FIELDS}
        np.savez(folder / _BATCHES, **arrays)
        command = [sys.executable, "-m", "finetune.planning.probe", name]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if done.returncode or not (folder / _ANSWER).is_file():
            return None
        return Taken(**json.loads((folder / _ANSWER).read_text(encoding="utf-8")))


def main(folder: Path) -> None:
    """The other process: read the request, take the steps, write the answer."""
    _be_first_to_go()
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    with np.load(folder / _BATCHES) as arrays:
        batches = [Batch(*(arrays[f"{number}-{key}"] for key in _FIELDS)) for number in range(request["batches"])]
    model, training = ModelConfig(**request["model"]), TrainingConfig(**request["training"])
    engine = choose_engine(model)
    for library in request["libraries"]:  # what the run has loaded already is not what a step takes
        importlib.import_module(library)
    before = _memory()
    if request["spares"]:
        engine.spare_memory()
    session = engine.open_training(
        Path(request["path"]),
        model_config=model,
        training=training,
        lora=LoraConfig.model_validate_json(json.dumps(request["lora"])),
        init=seeded_init(training.seed),
    )
    with closing(session):
        for _ in range(_STEPS):
            session.step(batches, learning_rate=training.learning_rate).result()
        arrays_held = session.peak_memory_bytes()
    after = _memory()
    taken = Taken(after[0] - before[0], after[1] - before[1], arrays_held)
    (folder / _ANSWER).write_text(json.dumps(asdict(taken)), encoding="utf-8")


def _be_first_to_go() -> None:
    """Where memory runs out, the system ends this process and not the run that waits for it."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000", encoding="ascii")


def _memory() -> tuple[int, int]:
    """The most bytes that this process has had so far: resident, and of address space."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text(encoding="ascii").splitlines())
        found = {parts[0]: int(parts[1]) * 1024 for parts in lines if parts[0] in ("VmHWM:", "VmPeak:")}
        return found["VmHWM:"], found["VmPeak:"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes, on a Mac
    return peak, 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]))

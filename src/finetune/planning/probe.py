"""Takes one step in a process of its own, and says what memory it took.

A process of its own, because a step that does not fit may be killed, and because nothing of it must be left in the
run: no state of a session, no random numbers, no memory that the C library keeps.
"""

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.errors import OutOfMemory
from finetune.core.machine import free_addresses, own_memory, unused_memory
from finetune.core.types import Batch
from finetune.engines.registry import choose_engine

_REQUEST, _BATCHES, _ANSWER, _ERRORS = "request.json", "batches.npz", "answer.json", "errors.txt"
_START = "import sys; sys.path[:] = {path!r}; from finetune.planning.probe import main; main({folder!r})"
_FIELDS = ("inputs", "targets", "loss_mask", "positions", "segments")
_LARGE_LIBRARIES = ("torch", "transformers", "mlx_lm", "pyarrow")
_STEPS = 2  # the second has the optimizer's state in memory from its start
_LOOK = 0.02  # seconds between two looks at what memory is left
_OTHER_FAULT = 3  # exit code for what has nothing to do with memory


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
    beside: int  # of the process before that, which the run itself does not need: it is there already


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The process ended before its steps did."""

    why: str  # for people
    for_memory: bool  # else something is wrong that no smaller step mends


def probe(run: ProbedRun, batches: Sequence[Batch], *, leave: int) -> Taken | NotTaken:
    """Take a step with these micro-batches in another process.

    That process is ended before less than `leave` bytes are unused. It ends with this one, however that ends.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-probe-") as name:
        folder = Path(name)
        _write_request(folder, run, batches)
        with (folder / _ERRORS).open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path, folder=name)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                process_group=0,  # Ctrl-C is this process's to answer
            )
        try:
            code = _watched(process, lambda: unused_memory() >= leave)
        finally:
            process.kill()
            process.communicate()
        if code == 0 and (folder / _ANSWER).is_file():
            return Taken(**json.loads((folder / _ANSWER).read_text(encoding="utf-8")))
        return NotTaken(_how_it_ended(code, folder), for_memory=code != _OTHER_FAULT)


def _write_request(folder: Path, run: ProbedRun, batches: Sequence[Batch]) -> None:
    sections = {key: getattr(run, key).model_dump(mode="json") for key in ("model", "training", "lora")}
    request = {"path": str(run.path), "spares": run.spares, "batches": len(batches), **sections}
    request["libraries"] = [library for library in _LARGE_LIBRARIES if library in sys.modules]
    (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
    arrays = {f"{number}-{key}": getattr(batch, key) for number, batch in enumerate(batches) for key in _FIELDS}
    np.savez(folder / _BATCHES, **arrays)


def _watched(process: subprocess.Popen[bytes], enough: Callable[[], bool]) -> int | None:
    """The exit code; None where the process was ended here, before it would have taken the last of the memory."""
    while True:
        try:
            return process.wait(timeout=_LOOK)
        except subprocess.TimeoutExpired:
            if not enough():
                return None


def _how_it_ended(code: int | None, folder: Path) -> str:
    if code is None:
        return "it came close to the last of the memory"
    if code < 0:
        return f"the system ended it ({signal.Signals(-code).name})"
    said = (folder / _ERRORS).read_text(encoding="utf-8", errors="replace").strip()
    return said.splitlines()[-1] if said else f"exit code {code}"


def main(name: str) -> None:
    """The other process: read the request, take the steps, write the answer."""
    folder = Path(name)
    threading.Thread(target=_end_with_the_run, args=(folder,), daemon=True).start()
    _be_first_to_go()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        taken = _take_steps(folder)
    except Exception as error:
        for_memory = _is_for_memory(error)
        reason = str(error).partition(". Lower ")[0]  # what to lower is said where nothing is left to try
        sys.stderr.write(f"{type(error).__name__}: {reason}\n")
        sys.exit(1 if for_memory else _OTHER_FAULT)
    (folder / _ANSWER).write_text(json.dumps(asdict(taken)), encoding="utf-8")


def _take_steps(folder: Path) -> Taken:
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    with np.load(folder / _BATCHES) as arrays:
        batches = [Batch(*(arrays[f"{number}-{key}"] for key in _FIELDS)) for number in range(request["batches"])]
    model, training = ModelConfig(**request["model"]), TrainingConfig(**request["training"])
    engine = choose_engine(model)
    for library in request["libraries"]:  # what the run has loaded already is not what a step takes
        importlib.import_module(library)
    before, beside = _memory(), own_memory()
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
    return Taken(after[0] - before[0], after[1] - before[1], arrays_held, beside)


def _is_for_memory(error: Exception) -> bool:
    """Where addresses are limited, libraries fail in many ways that do not say so."""
    no_room = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return no_room or isinstance(error, MemoryError | OutOfMemory) or free_addresses() is not None


def _end_with_the_run(folder: Path) -> None:
    """Standard input ends with the process that waits for this one."""
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


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

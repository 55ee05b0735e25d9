"""Takes one step in a process of its own, and says what memory it took.

A process of its own, because a step that does not fit may be killed, and because nothing of it must be left in the
run: no state of a session, no random numbers, no memory that the C library keeps.
"""

import ctypes
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.errors import OutOfMemory
from finetune.core.machine import free_addresses, own_memory, unused_memory
from finetune.core.types import Batch
from finetune.engines.registry import choose_engine

_START = "import sys; sys.path[:] = {path!r}; from finetune.planning.probe import main; main({parent})"
_REQUEST = "request"  # beside the arrays of the batches
_FIELDS = ("inputs", "targets", "loss_mask", "positions", "segments")
_LARGE_LIBRARIES = ("torch", "transformers", "mlx_lm", "pyarrow")
_STEPS = 2  # the second has the optimizer's state in memory from its start
_LOOK = 0.02  # seconds between two looks at what memory is left
_OTHER_FAULT = 3  # exit code for what has nothing to do with memory
_SIGNAL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


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

    That process is ended before less than `leave` bytes are unused. It ends with this one, however that ends, and what
    goes between the two are files without a name: nothing is left.
    """
    with TemporaryFile() as request, TemporaryFile() as answer, TemporaryFile() as errors:
        _write_request(request, run, batches)
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path, parent=os.getpid())],
            stdin=request,
            stdout=answer,
            stderr=errors,
            process_group=0,  # Ctrl-C is this process's to answer
        )
        try:
            code = _watched(process, lambda: unused_memory() >= leave)
        finally:
            process.kill()
            process.wait()
        if code == 0 and (said := _lines(answer)):
            return Taken(**json.loads(said[-1]))
        return NotTaken(_how_it_ended(code, _lines(errors)), for_memory=code != _OTHER_FAULT)


def _write_request(file: IO[bytes], run: ProbedRun, batches: Sequence[Batch]) -> None:
    sections = {key: getattr(run, key).model_dump(mode="json") for key in ("model", "training", "lora")}
    request = {"path": str(run.path), "spares": run.spares, "batches": len(batches), **sections}
    request["libraries"] = [library for library in _LARGE_LIBRARIES if library in sys.modules]
    arrays = {f"{number}-{key}": getattr(batch, key) for number, batch in enumerate(batches) for key in _FIELDS}
    np.savez(file, **{_REQUEST: np.array(json.dumps(request)), **arrays})
    file.seek(0)


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").strip().splitlines()


def _watched(process: subprocess.Popen[bytes], enough: Callable[[], bool]) -> int | None:
    """The exit code; None where the process was ended here, before it would have taken the last of the memory."""
    while True:
        try:
            return process.wait(timeout=_LOOK)
        except subprocess.TimeoutExpired:
            if not enough():
                return None


def _how_it_ended(code: int | None, said: list[str]) -> str:
    if code is None:
        return "it came close to the last of the memory"
    if code < 0:
        return f"the system ended it ({signal.Signals(-code).name})"
    return said[-1] if said else f"exit code {code}"


def main(parent: int) -> None:
    """The other process: read the request, take the steps, write the answer."""
    _end_with(parent)
    _be_first_to_go()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        taken = _take_steps(sys.stdin.buffer)
    except Exception as error:
        for_memory = _is_for_memory(error)
        reason = str(error).partition(". Lower ")[0]  # what to lower is said where nothing is left to try
        sys.stderr.write(f"{type(error).__name__}: {reason}\n")
        sys.exit(1 if for_memory else _OTHER_FAULT)
    sys.stdout.write(f"\n{json.dumps(asdict(taken))}\n")


def _take_steps(file: IO[bytes]) -> Taken:
    with np.load(file) as arrays:
        request = json.loads(str(arrays[_REQUEST]))
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


def _end_with(parent: int) -> None:
    """End when the run does that waits for this process.

    By the kernel on Linux: a thread would take 72 MB of addresses there, which are what may be limited.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WITH_PARENT, signal.SIGKILL)
        _end_without(parent)
    else:
        threading.Thread(target=_look_for, args=(parent,), daemon=True).start()


def _look_for(parent: int) -> None:
    while True:
        _end_without(parent)
        time.sleep(_LOOK)


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
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

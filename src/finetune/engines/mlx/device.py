"""Where the engine computes, how fast, and what it did with memory, told in the project's errors."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from finetune.config.schema import ModelConfig
from finetune.core import machine
from finetune.core.errors import UsageError
from finetune.core.types import Dtype
from finetune.engines.memory import memory_ran_out
from finetune.engines.mlx import compat
from finetune.engines.mlx.blas import reserve_buffers

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_SIGNS = ("malloc", "memory", "allocate")
_DEFAULT = mx.default_device()  # the fastest that this build of MLX has
_WIDTH = 1_000_000  # more operations than graphs have
_SIDE = 1024
_ROWS = {True: 256, False: 4096}  # on the CPU, and on a GPU, which needs more to be busy
_MEASURE_SECONDS = 0.2


def pick_device(name: str) -> Any:
    """The device that `model.device` means. Raises UsageError where this machine or this build of MLX lacks it."""
    problem = _device_problem(name)
    if problem:
        raise UsageError(problem)
    if name == "auto":
        return _DEFAULT
    return mx.Device(mx.cpu if name == "cpu" else mx.gpu)


def use_device(name: str) -> None:
    """Compute on the device that `model.device` means from here on. Raises OutOfMemory where it cannot."""
    mx.set_default_device(pick_device(name))
    if compat.on_cpu():
        reserve_buffers()
        _order_by_depth()


def _order_by_depth() -> None:
    """Let independent graphs of one evaluation advance together (see `workers`), not one after the other.

    MLX goes down one branch of a graph where more than this many operations wait, and reads the number once, at the
    first evaluation of a process. What nothing waits for is then computed last: see `ordering`.
    """
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", str(_WIDTH))


def hardware_problems(model: ModelConfig) -> list[str]:
    """What `model.device` asks for and this machine lacks. Every type works on every device, if slowly on the CPU."""
    problem = _device_problem(model.device)
    return [problem] if problem else []


def _device_problem(name: str) -> str | None:
    if name in {"auto", "cpu"} or compat.has_gpu(name):
        return None
    gpu = {"cuda": "NVIDIA GPU that it can use", "metal": "Metal GPU"}[name]
    return (
        f"model.device={name}: MLX {compat.versions()['mlx']} finds no {gpu} on this machine. "
        "Use model.device=cpu, or leave it out."
    )


def matmul_rate(dtype: Dtype) -> float:
    """FLOP/s of a product with a 1024 x 1024 matrix on the default device, the best of a fifth of a second."""
    rows = _ROWS[compat.on_cpu()]
    left, right = mx.ones((rows, _SIDE), DTYPES[dtype]), mx.ones((_SIDE, _SIDE), DTYPES[dtype])
    mx.eval(left, right)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MEASURE_SECONDS:
        begin = time.perf_counter()
        mx.eval(left @ right.T)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * rows * _SIDE * _SIDE / best


def free_memory(name: str) -> int:
    """Bytes that arrays could still take on the device that `model.device` means.

    Metal shares the machine's memory and keeps some of it for others; of a CUDA card MLX tells the size only.
    """
    free = machine.free_memory()
    if pick_device(name) == mx.cpu:
        return free
    held = int(mx.get_active_memory())
    info = mx.device_info()
    if mx.metal.is_available():
        return min(free, int(info["max_recommended_working_set_size"]) - held)
    return int(info["memory_size"]) - held if "memory_size" in info else free


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn MLX's failure to allocate into a TrainingError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise memory_ran_out(str(error)) from None

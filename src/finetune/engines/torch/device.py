"""Where the engine computes, in which type, how fast, and what it did with memory."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

from finetune.config.schema import ModelConfig
from finetune.core import machine
from finetune.core.errors import UsageError
from finetune.core.types import Dtype
from finetune.engines.memory import memory_ran_out
from finetune.engines.torch import compat

DTYPES: Mapping[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALVES = (torch.bfloat16, torch.float16)
_KINDS = {"cpu": "cpu", "cuda": "cuda", "metal": "mps"}
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_MEASURED = (1024, 1024, 1024)  # rows, inputs, outputs of the product that `matmul_rate` times
_MEASURE_SECONDS = 0.2


def pick_device(name: str) -> torch.device:
    """The device that `model.device` means; `auto` is CUDA, else Metal, else the CPU.

    Raises UsageError where the machine lacks it.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    problems = _device_problems(name)
    if problems:
        raise UsageError(problems[0])
    return torch.device(_KINDS[name])


def pick_dtype(wanted: Dtype | Literal["auto"], stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of products: `auto` takes bfloat16 where the files hold 16 bits and the device is fast in it."""
    if wanted != "auto":
        return DTYPES[wanted]
    return torch.bfloat16 if stored in _HALVES and compat.fast_in_bfloat16(device) else torch.float32


def hardware_problems(model: ModelConfig) -> list[str]:
    """What `model.device` and `model.dtype` ask for and this machine lacks, one sentence each."""
    problems = _device_problems(model.device)
    if problems:
        return problems
    device = pick_device(model.device)
    if model.dtype == "bfloat16" and not compat.fast_in_bfloat16(device):
        problems.append(
            f"model.dtype=bfloat16: {device_name(device)} has no bfloat16 arithmetic. Use model.dtype=float32."
        )
    if model.dtype == "float16" and device.type == "cpu":
        problems.append("model.dtype=float16: the CPU computes it hundreds of times slower. Use bfloat16 or float32.")
    return problems


def _device_problems(name: str) -> list[str]:
    if name == "cuda" and not torch.cuda.is_available():
        reason = "finds no NVIDIA GPU" if torch.version.cuda else "was built without CUDA"
        return [f"model.device=cuda: PyTorch {torch.__version__} {reason}. Use model.device=cpu, or leave it out."]
    if name == "metal" and not torch.backends.mps.is_available():
        return ["model.device=metal: this machine has no Metal GPU. Use model.device=cpu, or leave it out."]
    return []


def device_name(device: torch.device) -> str:
    """What the device is, for people."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA)"
    return "Apple GPU (Metal)" if device.type == "mps" else f"cpu ({compat.cpu_capability()})"


def matmul_rate(dtype: Dtype) -> float:
    """FLOP/s of a product of two 1024 x 1024 matrices on the default device, the best of a fifth of a second."""
    device = pick_device("auto")
    rows, inputs, outputs = _MEASURED
    left = torch.ones(rows, inputs, dtype=DTYPES[dtype], device=device)
    right = torch.ones(outputs, inputs, dtype=DTYPES[dtype], device=device)
    torch.nn.functional.linear(left, right)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MEASURE_SECONDS:
        _wait(device)
        begin = time.perf_counter()
        torch.nn.functional.linear(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * rows * inputs * outputs / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> int:
    """Bytes that arrays could still take there: of the GPU, or of the memory that it shares with the CPU."""
    free = machine.free_memory()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(free, torch.mps.recommended_max_memory()) if device.type == "mps" else free


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn PyTorch's failure to allocate into a TrainingError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and not any(sign in str(error).lower() for sign in _MEMORY_SIGNS):
            raise
        raise memory_ran_out(str(error).splitlines()[0] if str(error) else "") from None


class PeakMemory:
    """The most memory since it was made: of CUDA's allocator, else of the whole process.

    The operating system keeps one peak a process and never lowers it: on the CPU the answer is that peak (resident
    size, with Python and its libraries), also where it was reached before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        """Bytes so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) if sys.platform == "darwin" else int(peak) * 1024

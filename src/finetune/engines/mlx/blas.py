"""Finds the machine's OpenBLAS and loads it before MLX, which then uses it for its matrix products.

MLX's Linux CPU wheel carries a reference BLAS: about 6 GFLOP/s on two cores where OpenBLAS reaches 190. Symbols
of a library loaded with RTLD_GLOBAL win over those of the wheel, if it comes first. Where no OpenBLAS is found
everything works, slowly. The environment variable FT_OPENBLAS=off leaves it out.
"""

import ctypes
import ctypes.util
import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

from finetune.core.errors import OutOfMemory
from finetune.core.machine import free_addresses

PACKAGE = "libopenblas0-pthread"
SWITCH = "FT_OPENBLAS"
_NAMES = ("libopenblas.so.0", "libopenblas.so")
_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu/openblas-pthread",
    "/usr/lib/aarch64-linux-gnu/openblas-pthread",
    "/usr/lib64",
)
_BUFFER = 129 * 2**20  # bytes of addresses that OpenBLAS takes for a thread, with what lies around them


@dataclass(frozen=True, slots=True)
class BlasChoice:
    """Which BLAS computes matrix products on the CPU, and what would make it faster."""

    name: str
    advice: tuple[str, ...] = ()
    library: Any = None  # OpenBLAS, where it was loaded


@functools.cache
def load_openblas() -> BlasChoice:
    """Load OpenBLAS once per process; later calls say what the first one did."""
    if not sys.platform.startswith("linux"):
        return BlasChoice("Accelerate")
    if os.environ.get(SWITCH, "").lower() in {"off", "0", "false", "no"}:
        return BlasChoice("reference BLAS", (f"{SWITCH}=off keeps OpenBLAS out: matrix products are slow. Unset it.",))
    if "mlx.core" in sys.modules:
        return BlasChoice(
            "unknown", ("mlx was imported before finetune, too early for OpenBLAS. Import finetune first.",)
        )
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return BlasChoice("OpenBLAS", library=library)
    return BlasChoice(
        "reference BLAS",
        (f"No OpenBLAS found: training on the CPU is many times slower. On Debian: apt-get install {PACKAGE}",),
    )


@functools.cache
def reserve_buffers() -> None:
    """Where addresses are limited, give OpenBLAS now what it needs of them for its threads.

    It takes a buffer at the first product of each thread otherwise, and where there is no room it tries for ever.
    Raises OutOfMemory where there is none.
    """
    library = load_openblas().library
    if free_addresses() is None or not hasattr(library, "blas_memory_alloc"):
        return
    library.blas_memory_alloc.restype = ctypes.c_void_p
    taken = [_buffer(library) for _ in range(library.openblas_get_num_threads())]
    for buffer in taken:  # kept for whoever multiplies
        library.blas_memory_free(ctypes.c_void_p(buffer))


def _buffer(library: Any) -> int:
    free, threads = free_addresses(), library.openblas_get_num_threads()
    if free is not None and free < _BUFFER:
        raise OutOfMemory(
            f"OpenBLAS takes {_BUFFER >> 20} MiB of addresses for each of {threads} threads, and {free >> 20} MiB are "
            "left. Raise the limit (ulimit -v), or set OPENBLAS_NUM_THREADS=1."
        )
    return int(library.blas_memory_alloc(0))


def _candidates() -> tuple[str, ...]:
    found = ctypes.util.find_library("openblas")
    paths = tuple(f"{folder}/{_NAMES[0]}" for folder in _FOLDERS)
    return (*_NAMES, *paths, *((found,) if found else ()))

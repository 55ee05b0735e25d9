"""Independent graphs computed side by side on the cores of a CPU.

MLX runs everything but matrix products on one core. A step's documents are therefore dealt out to as many workers
as the BLAS library would use threads; each has a stream, which is a thread of MLX, and multiplies on its own core.

All streams share a short queue of tasks. Graphs evaluated by a thread each fill it with their own tasks and leave
other streams idle for a third of the time, so one evaluation takes a graph of each worker and goes through them in
step. That needs MLX to order operations by their depth: see `device.use_device`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

import mlx.core as mx

from finetune.config.schema import TrainingConfig
from finetune.engines.mlx.blas import load_openblas

T = TypeVar("T")


def useful_workers(training: TrainingConfig, *, on_cpu: bool) -> int:
    """Graphs to compute side by side: one for each thread of the BLAS, where there are rows enough.

    One for full tuning, because each has gradients of its own.
    """
    library: Any = load_openblas().library if on_cpu else None
    threads = library.openblas_get_num_threads() if library else 1
    return 1 if training.method == "full" else max(1, min(training.most_rows, threads))


class Workers:
    """`count` workers; more than one need OpenBLAS."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._library: Any = load_openblas().library if count > 1 else None
        self._streams = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(self.count)] if self.count > 1 else []

    def evaluate(self, builds: Sequence[Callable[[], list[T]]]) -> list[list[T]]:
        """Each function, called here, builds a chain of graphs for one worker; the chains are evaluated in order."""
        chains = []
        for stream, build in zip(self._streams, builds, strict=False):
            with mx.stream(stream):
                chains.append(build())
        with self._one_thread_each():
            for graphs in zip_longest(*chains):
                mx.eval([graph for graph in graphs if graph is not None])
        return chains

    @contextmanager
    def _one_thread_each(self) -> Iterator[None]:
        threads = self._library.openblas_get_num_threads()
        self._library.openblas_set_num_threads(1)
        try:
            yield
        finally:
            self._library.openblas_set_num_threads(threads)

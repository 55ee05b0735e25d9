"""Processes that share the work on the chunks of a file.

They are new interpreters that import nothing but this package's data part: never forks, which a process with the
threads of an engine does not survive, and never a second run of the person's own script. Each gets a chunk at a time
and gives back its arrays; the results come in the order of the chunks, whatever the number of processes.
A worker ends when its standard input does, so none outlives the process that started it, however that ends.
"""

import contextlib
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from finetune.core.errors import DataError, FinetuneError
from finetune.core.machine import tidied
from finetune.data.encoding import Encoder, ReadChunk, Reading, read_chunk
from finetune.data.readers import Chunk

# Works on the chunks of one file; results are in the order of the chunks.
Processing: TypeAlias = Callable[[Iterable[Chunk], Reading, Encoder | None], Iterator[ReadChunk]]

_START = "import sys; sys.path[:] = {path!r}; from finetune.data.workers import serve; serve()"
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def here(chunks: Iterable[Chunk], reading: Reading, encoder: Encoder | None) -> Iterator[ReadChunk]:
    """All of it in this process."""
    return (read_chunk(chunk, reading, encoder) for chunk in chunks)


@contextmanager
def processing(processes: int) -> Iterator[Processing]:
    """A way to work on chunks in so many processes (1: in this one), which end with the block."""
    if processes == 1:
        yield here
        return
    pool = _Pool(processes)
    try:
        yield pool.process
    finally:
        pool.close()


class _Worker:
    """One process, and what it was last told."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ONE_THREAD},
            process_group=0,  # Ctrl-C goes to a whole group: it must not end a worker before the one that started it
        )
        self._encoder: Encoder | None = None

    def read(self, chunk: Chunk, reading: Reading, encoder: Encoder | None) -> ReadChunk:
        """`read_chunk`, over there. Raises what it raises, and DataError where the process is gone."""
        news = None if encoder is self._encoder else _Told(encoder)  # a tokenizer is large, and the same for long
        try:
            _send(self._process.stdin, (chunk, reading, news))
            result = _receive(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(self._gone()) from error
        self._encoder = encoder
        if isinstance(result, BaseException):
            raise result
        found: ReadChunk = result
        return found

    def _gone(self) -> str:
        code = self._process.wait()
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = " The system may have run out of memory." if code == -signal.SIGKILL else ""
        return (
            f"A process that reads the data ended before its work was done ({why}).{hint} "
            "Start again; FT_DATA_PROCESSES=1 does all of it in one process, with less memory."
        )

    def end(self) -> None:
        """At once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                _close(pipe)


@dataclass(frozen=True, slots=True)
class _Told:
    """The encoder from now on."""

    encoder: Encoder | None


class _Pool:
    """Hands each chunk to the next worker that is free. They start with the first chunk: rows may all be cached."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._workers: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="data")

    def process(self, chunks: Iterable[Chunk], reading: Reading, encoder: Encoder | None) -> Iterator[ReadChunk]:
        """The results in order; few chunks are under way or waiting at any time."""
        while len(self._workers) < self._processes:
            self._workers.append(_Worker())
            self._free.put(self._workers[-1])
        waiting: deque[Future[ReadChunk]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._one, chunk, reading, encoder))
            if len(waiting) > len(self._workers) + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _one(self, chunk: Chunk, reading: Reading, encoder: Encoder | None) -> ReadChunk:
        worker = self._free.get()
        try:
            return worker.read(chunk, reading, encoder)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End the processes first: a thread that waits for one wakes up by that."""
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)


def serve() -> None:
    """What a worker does: chunks from standard input, results to standard output, until the input ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints is no result
    encoder: Encoder | None = None
    gc.freeze()  # what is imported stays, so that a collection takes 0.1 ms
    with contextlib.suppress(EOFError, BrokenPipeError):
        for chunk, reading, news in tidied(iter(lambda: _receive(source), None)):
            encoder = encoder if news is None else news.encoder
            _send(target, _result(chunk, reading, encoder))
            gc.collect()  # Python keeps 2,000 freed tuples of each length until everything is collected


def _result(chunk: Chunk, reading: Reading, encoder: Encoder | None) -> ReadChunk | Exception:
    try:
        return read_chunk(chunk, reading, encoder)
    except FinetuneError as error:
        return error
    except MemoryError:
        return DataError("A process that reads the data has no memory left. FT_DATA_PROCESSES=1 needs the least.")


def _send(pipe: IO[bytes] | None, value: Any) -> None:
    """Into the pipe as it is pickled: nowhere is there a copy of the whole.

    What goes with every chunk are named tuples: each time that a dataclass with slots is pickled, Python keeps a freed
    tuple, up to 2,000 of every length.
    """
    assert pipe is not None
    pickle.dump(value, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    """Raises EOFError at the end, and UnpicklingError in the midst."""
    assert pipe is not None
    return pickle.load(pipe)


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:  # bytes that the process did not take
        return

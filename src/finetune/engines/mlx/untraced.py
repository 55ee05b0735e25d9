"""Builds the inside of an `mx.custom_function` where MLX does not differentiate, so that compiled loops stay compiled.

While MLX differentiates, it runs compiled functions operation by operation, since it looks for gradients in them.
That state belongs to a thread: the graph is therefore built on another one, for the caller's stream. Without this a
step on the CPU takes about a seventh longer. Where nothing is differentiated the way to the other thread and back is
saved: see `undifferentiated`.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx

from finetune.engines.mlx import compat

T = TypeVar("T")
_Work: TypeAlias = tuple[Callable[[], Any], Future[Any]]
_PLAIN: ContextVar[bool] = ContextVar("undifferentiated", default=False)


@contextmanager
def undifferentiated() -> Iterator[None]:
    """Promise that MLX does not differentiate what is built here."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def untraced(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, whose graph the CPU's bystander thread builds; other devices have no use for that."""

    @wraps(function)
    def run(*arguments: Any) -> T:
        if _PLAIN.get() or not compat.on_cpu():
            return function(*arguments)
        stream = mx.default_stream(mx.default_device())

        def build() -> T:
            with mx.stream(stream):
                return function(*arguments)

        done: Future[T] = Future()
        _bystander(os.getpid()).put((build, done))
        return done.result()

    return run


@lru_cache(maxsize=1)
def _bystander(process: int) -> SimpleQueue[_Work]:
    """The queue of a thread of this process; a forked one starts its own.

    The thread never ends: when one does, MLX frees what it compiled there, which needs the interpreter and so aborts
    a process that is ending at that moment.
    """
    works: SimpleQueue[_Work] = SimpleQueue()
    threading.Thread(target=_serve, args=(works,), name="mlx-untraced", daemon=True).start()
    return works


def _serve(works: SimpleQueue[_Work]) -> None:
    while True:
        build, done = works.get()
        try:
            done.set_result(build())
        except BaseException as error:  # raised again where the result is waited for
            done.set_exception(error)
        del build, done  # else the last graph stays in memory until the next

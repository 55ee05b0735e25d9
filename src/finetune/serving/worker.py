"""The one thread that owns the engine. Everybody else talks to it through its inbox.

MLX and PyTorch are not made for several threads: the model is opened, asked, changed and closed on this one.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

from finetune.core.errors import FinetuneError, UsageError
from finetune.core.lasting_thread import LastingThread
from finetune.core.types import RequestId
from finetune.engines.base import Generator, InferenceSession
from finetune.generation.answers import Piece
from finetune.serving import watch
from finetune.serving.errors import ApiError, invalid, unavailable
from finetune.serving.jobs import Job
from finetune.serving.watch import Watch

log = logging.getLogger("finetune.serving")

Result = TypeVar("Result")
OpenSession = Callable[[], AbstractContextManager[InferenceSession]]
Delivery = tuple[Job, Piece | ApiError]

_STOPPED = "The server is shutting down."
_HANGS = "The engine has not come back from a step for a long time. It may hang: start the server again."


class Worker:
    """Decodes jobs together, at most `max_batch` at a time, in the order in which they came."""

    def __init__(self, open_session: OpenSession, *, max_batch: int) -> None:
        self._open_session = open_session
        self._max_batch = max_batch
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing enters the inbox once the work is over
        self._opened: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: str | None = None
        self._stopping = False
        self._watch = Watch()
        self._waiting: deque[Job] = deque()
        self._active: dict[RequestId, Job] = {}
        self._postponed: list[tuple[str, Callable[[], None]]] = []
        self._session: InferenceSession
        self._generator: Generator
        self._thread = LastingThread(self._run, "engine")

    def start(self) -> None:
        """Open the model. Raises what opening it raises."""
        self._thread.start()
        self._opened.result()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Where pieces are delivered."""
        self._loop = loop

    @property
    def failure(self) -> str | None:
        """Why nothing is decoded any more, or just now; None while all is well."""
        if self._failure is None and self._thread.over.is_set():
            return "The engine has stopped. Start the server again."
        return _HANGS if self._failure is None and self._watch.overdue else self._failure

    @property
    def active(self) -> int:
        """Answers that are decoding now."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Answers that wait for a place."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError (503) where the engine is gone."""
        self._put(lambda: self._waiting.append(job))

    def cancel(self, job: Job) -> None:
        """Forget a job, which gets no further piece; its place is free before the next step."""
        try:
            self._put(lambda: self._forget(job))
        except ApiError:
            return  # a thread that has left holds no place

    def call(self, function: Callable[[InferenceSession], Result], *, when_idle: str | None = None) -> Future[Result]:
        """Run a function between two steps; with `when_idle`, once no job of that adapter is left."""
        future: Future[Result] = Future()

        def run() -> None:
            if self._failure is not None:
                future.set_exception(unavailable(self._failure))
                return
            try:
                with self._watch.over(watch.CALL_SECONDS):
                    future.set_result(function(self._session))
            except BaseException as error:  # the caller's to handle
                future.set_exception(error)

        self._put(run if when_idle is None else lambda: self._postponed.append((when_idle, run)))
        return future

    def stop(self) -> None:
        """End all jobs with an error and close the model; returns when that is done, or when the engine hangs."""

        def leave() -> None:
            self._stopping = True

        with suppress(ApiError):
            self._put(leave)
        while not self._thread.over.wait(timeout=0.2):
            if self._watch.overdue:
                log.error("The engine does not come back from a step: it is left behind.")
                return

    def _put(self, action: Callable[[], None]) -> None:
        with self._lock:
            if self._failure is not None:
                raise unavailable(self._failure)
            self._inbox.put(action)

    def _run(self) -> None:
        try:
            with self._open_session() as self._session:
                self._opened.set_result(None)
                self._serve()
            self._leave(_STOPPED)
        except BaseException as error:
            if not self._opened.done():
                self._leave(_STOPPED)
                self._opened.set_exception(error)
                return
            log.error("The engine failed: %s: %s", type(error).__name__, error)
            self._leave(f"The engine failed ({type(error).__name__}). Start the server again.")

    def _serve(self) -> None:
        self._generator = self._session.generator()
        while True:
            self._read_inbox(block=not (self._active or self._waiting or self._postponed))
            if self._stopping:
                return
            self._run_postponed()
            try:
                self._admit()
                self._step()
            except FinetuneError as error:  # memory ran out: these answers are lost, the model is not
                log.error("%s", error)
                self._end_all(unavailable(str(error)))
                self._generator = self._session.generator()

    def _read_inbox(self, *, block: bool) -> None:
        if block:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _run_postponed(self) -> None:
        used = {job.request.adapter for job in (*self._active.values(), *self._waiting)} if self._postponed else set()
        ready = [run for adapter, run in self._postponed if adapter not in used]
        self._postponed = [(adapter, run) for adapter, run in self._postponed if adapter in used]
        for run in ready:
            run()

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._max_batch:
            job = self._waiting.popleft()
            try:
                self._active[self._generator.add(job.request)] = job
            except UsageError as error:
                self._publish([(job, invalid(str(error)))])

    def _step(self) -> None:
        if not self._active:
            return
        with self._watch.over(watch.step_seconds(job.request for job in self._active.values())):
            events = self._generator.step()
        ready: list[Delivery] = []
        for event in events:
            job = self._active.get(event.request)
            if job is None:
                continue
            piece = job.take(event)
            if piece is not None:
                ready.append((job, piece))
                if piece.finish_reason is not None:
                    del self._active[event.request]
                    if event.finish_reason is None:
                        self._generator.cancel(event.request)
        self._publish(ready)

    def _forget(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        for number, active in list(self._active.items()):
            if active is job:
                del self._active[number]
                self._generator.cancel(number)

    def _publish(self, ready: list[Delivery]) -> None:
        if not ready or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, ready)
        except RuntimeError:
            return  # the loop is closed: nobody waits

    def _end_all(self, error: ApiError) -> None:
        lost = [*self._active.values(), *self._waiting]
        self._active.clear()
        self._waiting.clear()
        self._publish([(job, error) for job in lost])

    def _leave(self, reason: str) -> None:
        """Let nothing in any more, and tell everybody who waits."""
        with self._lock:
            self._failure = reason
        while not self._inbox.empty():
            self._inbox.get()()
        for _, run in self._postponed:
            run()
        self._end_all(unavailable(reason))


def _deliver(ready: list[Delivery]) -> None:
    for job, piece in ready:
        job.deliver(piece)

"""One HTTP request under way, as the event loop sees it: jobs at the worker, a deadline, places in the queue."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from finetune.core.types import GenerationRequest
from finetune.generation.answers import AnswerText, Piece
from finetune.serving.errors import ApiError, busy, out_of_time
from finetune.serving.jobs import Job, joined
from finetune.serving.worker import Worker


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer that is asked for; `text` follows it from its first token."""

    request: GenerationRequest
    text: AnswerText


class Places:
    """How many answers decode or wait at once. Counted on the event loop alone, so that it needs no lock."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def take(self, count: int) -> None:
        """Take places. Raises ApiError (429) where there are not enough."""
        if self.taken + count > self.most:
            raise busy(self.taken)
        self.taken += count

    def give_back(self) -> None:
        """One answer is done or forgotten."""
        self.taken -= 1


class Call:
    """The answers of one HTTP request. `close` frees whatever is left of it, at any time and more than once."""

    def __init__(
        self,
        worker: Worker,
        places: Places,
        *,
        timeout: float,
        whole: bool,
        keepalive: float,
        on_close: Callable[["Call"], None],
    ) -> None:
        self._worker = worker
        self._places = places
        self._whole = whole
        self._timeout = timeout
        self._keepalive = keepalive
        self._on_close: Callable[[Call], None] | None = on_close
        self._began = time.monotonic()
        self._pieces: asyncio.Queue[tuple[int, Piece | ApiError]] = asyncio.Queue()
        self._open: dict[int, Job] = {}
        self.completion_tokens = 0
        self.first_token_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._began

    def start(self, choices: Sequence[Choice]) -> None:
        """Queue all answers. Raises ApiError (429, 503) and queues none."""
        self._places.take(len(choices))
        for index, choice in enumerate(choices):
            self._open[index] = Job(choice.request, choice.text, self._whole, self._deliverer(index))
        try:
            for job in self._open.values():
                self._worker.submit(job)
        except BaseException:
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[tuple[int, Piece] | None]:
        """(number of the answer, piece) as they come, until all have ended; None after a while of silence.

        Raises ApiError: the engine's, or out of time.
        """
        try:
            while self._open or not self._pieces.empty():
                yield await self._next()
        finally:
            self.close()

    async def answers(self) -> list[Piece]:
        """All answers, whole, in their order."""
        gathered: dict[int, list[Piece]] = {}
        async for found in self.pieces():
            if found is not None:
                gathered.setdefault(found[0], []).append(found[1])
        return [joined(gathered[index]) for index in sorted(gathered)]

    def close(self) -> None:
        """Forget what is still under way, and say once that the call is over."""
        for index in list(self._open):
            self._worker.cancel(self._ended(index))
        if self._on_close is not None:
            self._on_close(self)
            self._on_close = None

    async def _next(self) -> tuple[int, Piece] | None:
        left = self._timeout - self.seconds
        try:
            async with asyncio.timeout(max(0.0, min(left, self._keepalive))):
                index, piece = await self._pieces.get()
        except TimeoutError:
            if left <= self._keepalive:
                raise out_of_time(self._timeout) from None
            return None
        if isinstance(piece, ApiError):
            raise piece
        return index, piece

    def _deliverer(self, index: int) -> Callable[[Piece | ApiError], None]:
        def deliver(piece: Piece | ApiError) -> None:
            if index not in self._open:
                return  # closed in the meantime
            if self.first_token_seconds is None and isinstance(piece, Piece):
                self.first_token_seconds = self._open[index].first_token_at - self._began
            if isinstance(piece, ApiError) or piece.finish_reason is not None:
                self._ended(index)
            self._pieces.put_nowait((index, piece))

        return deliver

    def _ended(self, index: int) -> Job:
        job = self._open.pop(index)
        self.completion_tokens += job.tokens
        self._places.give_back()
        return job

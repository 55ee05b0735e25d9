"""Server-sent events: chunks of an answer as they come, comments while nothing does, and the end."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from finetune.serving.errors import ApiError

Result = TypeVar("Result")
Chunks = AsyncIterator[dict[str, Any] | None]

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
_CLOSED = 499  # nginx's number for a client that went away; nobody reads it


def event(document: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """Sends chunks until they end or the client goes away; then `close` is called, whatever happened.

    A chunk of None is a sign of life. An error after the first byte becomes an event of its own: the status line is
    gone by then.
    """

    def __init__(self, chunks: Chunks, *, close: Callable[[], None], timeout: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        try:
            async with asyncio.timeout(self._timeout):  # a client that stops reading must not hold its place
                await unless_gone(receive, self._send(send))
        except TimeoutError:
            return
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                content = KEEPALIVE if chunk is None else event(chunk)
                await send({"type": "http.response.body", "body": content, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.document()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """The result of the work; None, with the work cancelled, where the client goes away before it is done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(request: Request, work: Awaitable[Result]) -> Result | Response:
    """The result of the work, or a response for nobody where the client went away."""
    result = await unless_gone(request.receive, work)
    return Response(status_code=_CLOSED) if result is None else result

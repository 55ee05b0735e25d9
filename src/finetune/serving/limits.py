"""What stands in front of the routes: a request's number and line in the log, keys, bodies of bounded size."""

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serving.errors import ApiError, invalid
from finetune.serving.settings import LOOPBACK

log = logging.getLogger("finetune.serving")

OPEN_PATHS = frozenset({"/health"})
_OTHER = "other"
_PATIENCE = 8  # times the limit


class Observed:
    """Gives every request a number of the server's own, and says in one line how it was answered.

    Neither headers nor bodies nor query strings are logged: they may hold keys, and what people ask.
    """

    def __init__(self, app: ASGIApp, on_answer: Callable[[str, int], None]) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, began, status = f"req_{uuid.uuid4().hex}", time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = number
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", _OTHER)
            self._on_answer(route, status)
            milliseconds = (time.monotonic() - began) * 1e3
            log.info("%s %s %s %d %.0f ms", number, scope["method"], route, status, milliseconds)


class WithKey:
    """Lets nobody in without one of the keys. Without keys, a local server only answers to its local names.

    The latter keeps web pages away that point a name of their own at this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, keys: tuple[str, ...], local: bool) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        error = None
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            error = self._without_key(headers) if self._keys else self._from_elsewhere(headers)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _without_key(self, headers: Headers) -> ApiError | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        # All keys are compared, each in constant time: nothing is learned from how long it takes.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() == "bearer" and any(matches):
            return None
        what = "No API key is given" if not given else "The API key is wrong"
        message = f"{what}. Send the header `Authorization: Bearer KEY` with a key of this server."
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _from_elsewhere(self, headers: Headers) -> ApiError | None:
        name = headers.get("host", "") or LOOPBACK[0]
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if not self._local or name.lower() in LOOPBACK:
            return None
        return ApiError(403, "This server answers to localhost only. Start it with an API key to use another name.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


class BoundedBody:
    """Reads a body of at most `limit` bytes within `seconds`, and hands it on only if it is sound JSON."""

    def __init__(self, app: ASGIApp, *, limit: int, seconds: float) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replaying(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                length = await self._gather(body, receive)
        except TimeoutError:
            late = f"The body did not come within {self._seconds:g} s."
            raise ApiError(408, late, headers={"Connection": "close"}) from None
        if length is None:
            return None
        if length > self._limit:
            message = f"The body is larger than this server takes ({self._limit:,} bytes)."
            raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
        if body and "json" in headers.get("content-type", ""):
            _check_json(bytes(body))
        return bytes(body)

    async def _gather(self, body: bytearray, receive: Receive) -> int | None:
        """Fill `body` up to the limit and return the length; None where the client went away.

        What is over the limit is read and dropped for a while: most clients read an answer only after they have sent
        everything.
        """
        length = 0
        while length <= _PATIENCE * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            length += len(message.get("body", b""))
            if length <= self._limit:
                body += message.get("body", b"")
            else:
                body.clear()
            if not message.get("more_body", False):
                break
        return length


def _check_json(body: bytes) -> None:
    """Refuse what other parsers would let through to break things later: lone surrogates, NaN, deep nesting."""
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read yet."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

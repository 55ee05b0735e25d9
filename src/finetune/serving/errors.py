"""Every refusal in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from finetune.core.errors import FinetuneError
from finetune.serving.schemas import unsupported_fields

log = logging.getLogger("finetune.serving")

INVALID = "invalid_request_error"
# Kinds of places that pydantic puts into the path of a problem, and that a client never wrote.
_UNION_TAGS = ("list[", "constrained-", "function-", "dict[")
_UNSUPPORTED = unsupported_fields()


class ApiError(Exception):
    """A request that is answered with an error instead of a completion."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """What the client reads."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The same as an answer of its own."""
        return json_response(self.document(), status=self.status, headers=self.headers)


def json_response(document: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, which no text of a model can break."""
    content = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return Response(content, status, headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    """404 for a model name, with those that are served."""
    message = f"The model {name!r} does not exist. This server has: {', '.join(known)}."
    return ApiError(404, message, param="model", code="model_not_found")


def busy(waiting: int) -> ApiError:
    """429: as many answers wait as may."""
    message = f"The server is busy: {waiting} answers are decoding or waiting. Try again in a moment."
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": "1"})


def unavailable(reason: str) -> ApiError:
    """503: nothing can be decoded, now or ever again."""
    return ApiError(503, reason, kind="server_error", code="unavailable")


def out_of_time(seconds: float) -> ApiError:
    """504: the answer took longer than the server allows. Clients are told not to ask for the same again."""
    message = f"The answer took longer than {seconds:g} s. Ask for fewer tokens, or stream and stop earlier."
    return ApiError(504, message, kind="server_error", code="timeout", headers={"x-should-retry": "false"})


def install_handlers(app: FastAPI) -> None:
    """Turn everything that a route can raise into OpenAI's form."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(FinetuneError, _finetune_error)
    app.add_exception_handler(Exception, _fault)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _finetune_error(_request: Request, error: Exception) -> Response:
    return invalid(str(error)).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {
        404: f"There is nothing at {request.url.path}. See /openapi.json for what there is.",
        405: f"{request.method} is not possible at {request.url.path}.",
    }
    message = texts.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def _fault(request: Request, error: Exception) -> Response:
    log.error("A fault of finetune in %s: %s: %s", request.url.path, type(error).__name__, error)
    message = "The server failed in a way that it does not know. Its log says more."
    return ApiError(500, message, kind="server_error", code="internal_error").response()


def from_validation(error: RequestValidationError) -> ApiError:
    """All problems of a body in one message; `param` and `code` are those of the first."""
    problems = [(_place(problem["loc"]), problem) for problem in error.errors()]
    place, first = problems[0]
    lines = list(dict.fromkeys(_sentence(place, problem) for place, problem in problems))
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else None
    return invalid(" ".join(lines[:8]), place or None, code)


def _place(location: tuple[Any, ...]) -> str:
    parts = [str(part) for part in location if part not in {"body", "query", "path"}]
    if len(parts) > 1 and parts[-1] in {"str", "int", "float", "none"}:
        parts.pop()
    return ".".join(part for part in parts if not part.startswith(_UNION_TAGS))


def _sentence(place: str, problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"Unknown parameter: {place!r}. This server does not have it; leave it out."
    if problem["type"] == "missing":
        return f"Missing required parameter: {place!r}." if place else "The body is empty. Send a JSON object."
    if not _UNSUPPORTED.isdisjoint(place.split(".")):
        return f"Unsupported parameter: {place!r}. This server does not have it; leave it out."
    if not place and problem["type"] == "model_attributes_type":  # a list, a number, or bytes of another content type
        return "The body is no JSON object. Send one, with the header Content-Type: application/json."
    text = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"Invalid value for {place!r}: {text}." if place else f"Invalid body: {text}."

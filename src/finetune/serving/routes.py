"""The addresses of the server. Each function reads like what the address does; the work is elsewhere."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from finetune.serving import documents
from finetune.serving.errors import ApiError, json_response, unavailable
from finetune.serving.metrics import CONTENT_TYPE
from finetune.serving.schemas import ChatRequest, CompletionRequest, LoadAdapter, SamplingBody, UnloadAdapter
from finetune.serving.service import Planned, Service
from finetune.serving.streaming import EventStream, whole


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Running = Annotated[Service, Depends(_service)]

_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_STREAM = {"text/event-stream": {"schema": {**_EVENT, "description": "With `stream`: chunks as JSON, then [DONE]."}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        400: "The request cannot be understood or fulfilled.",
        401: "No key, or a wrong one.",
        403: "Not possible on this server.",
        404: "There is no such model.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        429: "The server is busy: try again after `Retry-After` seconds.",
        503: "The engine does not decode.",
        504: "The answer took too long.",
    }
    return {status: {"model": documents.Error, "description": meanings[status]} for status in statuses}


_DECODING = _errors(400, 401, 403, 404, 408, 413, 429, 503, 504)
_ALWAYS = _errors(400, 401, 403, 408, 413)

router = APIRouter()


@router.get("/health", response_model=documents.Health, responses=_errors(400, 408, 413, 503), summary="Is it alive?")
async def health(service: Running) -> Response:
    """200 while the engine decodes, 503 when it does not. Needs no key."""
    if service.worker.failure is not None:
        raise unavailable(service.worker.failure)
    return json_response({"status": "ok"})


@router.get(
    "/metrics",
    responses={**_ALWAYS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=Response,
    summary="Figures for Prometheus",
)
async def metrics(service: Running) -> Response:
    """Requests, tokens, queue, time to the first token and to the last."""
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/v1/models", response_model=documents.ModelList, responses=_ALWAYS, summary="All models")
async def list_models(service: Running) -> Response:
    """The base and the adapters that requests can name."""
    listed = [service.catalogue.document(model) for model in service.catalogue]
    return json_response({"object": "list", "data": listed})


@router.get("/v1/models/{model:path}", response_model=documents.Model, responses=_errors(400, 401, 403, 404, 408, 413))
async def show_model(model: str, service: Running) -> Response:
    """One of them."""
    return json_response(service.catalogue.document(service.catalogue.find(model)))


@router.post(
    "/v1/chat/completions",
    response_model=documents.ChatCompletion,
    responses={**_DECODING, 200: {"content": _STREAM}},
    summary="Answer a conversation",
)
async def chat_completions(body: ChatRequest, request: Request, service: Running) -> Response:
    """The model's next turn, rendered through the template that it was tuned with."""
    return await _answer(service, request, body, await service.chat(body))


@router.post(
    "/v1/completions",
    response_model=documents.Completion,
    responses={**_DECODING, 200: {"content": _STREAM}},
    summary="Continue a text",
)
async def completions(body: CompletionRequest, request: Request, service: Running) -> Response:
    """What follows a text, without a template."""
    return await _answer(service, request, body, await service.completion(body))


async def _answer(service: Service, request: Request, body: SamplingBody, planned: Planned) -> Response:
    call = service.start(body, planned)
    if body.stream:
        chunks = planned.envelope.chunks(call, include_usage=body.include_usage)
        return EventStream(chunks, close=call.close, timeout=service.settings.timeout + service.settings.keepalive)
    try:
        document = await whole(request, planned.envelope.whole(call))
    finally:
        call.close()
    return document if isinstance(document, Response) else json_response(document)


@router.post("/v1/load_lora_adapter", response_model=documents.AdapterChange, responses=_DECODING)
async def load_lora_adapter(body: LoadAdapter, service: Running) -> Response:
    """Load an adapter from the server's adapter directory, and serve it under a name."""
    _require_changes(service)
    model = await service.adapters.load(body.lora_name, body.lora_path)
    return json_response({"status": "success", "message": f"The adapter {model.id!r} is loaded."})


@router.post("/v1/unload_lora_adapter", response_model=documents.AdapterChange, responses=_DECODING)
async def unload_lora_adapter(body: UnloadAdapter, service: Running) -> Response:
    """Stop serving an adapter. Answers under way end with it."""
    _require_changes(service)
    await service.adapters.unload(body.lora_name)
    return json_response({"status": "success", "message": f"The adapter {body.lora_name!r} is unloaded."})


def _require_changes(service: Service) -> None:
    if not service.adapters.can_change:
        raise ApiError(403, "Loading adapters is off. Start the server with --allow-adapter-loading.", code="disabled")

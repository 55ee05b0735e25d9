"""The FastAPI application: routes, what stands in front of them, and their description in OpenAPI."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from finetune.serving.errors import install_handlers
from finetune.serving.limits import OPEN_PATHS, BoundedBody, Observed, WithKey
from finetune.serving.routes import router
from finetune.serving.service import Service


def make_app(service: Service) -> FastAPI:
    """An application for one service."""
    app = bare_app(service.version)
    app.state.service = service
    install_handlers(app)
    _put_in_front(app, service)
    return app


def bare_app(version: str) -> FastAPI:
    """The routes and their description. Interactive pages are off: they would load scripts from elsewhere."""
    app = FastAPI(title="finetune", version=version, docs_url=None, redoc_url=None, lifespan=_attached)
    app.include_router(router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _put_in_front(app: FastAPI, service: Service) -> None:
    """The last one added is the first to see a request."""
    settings = service.settings
    app.add_middleware(BoundedBody, limit=settings.max_body, seconds=settings.body_timeout)
    app.add_middleware(WithKey, keys=settings.api_keys, local=settings.is_local)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Observed, on_answer=service.metrics.answered)


@asynccontextmanager
async def _attached(app: FastAPI) -> AsyncIterator[None]:
    """Pieces of answers come to the event loop that runs the application."""
    app.state.service.worker.attach(asyncio.get_running_loop())
    yield


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with what FastAPI cannot know: keys, and that its 422 is a 400 here."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in described["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {}]
        for name in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(name, None)
        app.openapi_schema = described
    return app.openapi_schema

"""`ft serve`: a model and its adapters behind an API that OpenAI's clients speak, until somebody stops it."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from finetune import __version__
from finetune.core.errors import FinetuneError, StoppedBySignal, UsageError
from finetune.serving.settings import ServerSettings
from finetune.workflows.opening import open_session
from finetune.workflows.subjects import find_subject

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def serve(
    model: str,
    *,
    adapters: Mapping[str, Path] | None = None,
    name: str | None = None,
    checkpoint: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    template: str | None = None,
    settings: ServerSettings | None = None,
    on_notice: Callable[[str], None] = lambda _message: None,
) -> None:
    """Serve a run or a model, with further adapters by name. Returns by StoppedBySignal (SIGINT, SIGTERM) alone.

    Raises UsageError before anything is loaded: an address that is taken, names that are, templates that differ from
    training's.
    """
    require_extra()
    from finetune.serving import server
    from finetune.serving.adapters import Adapters
    from finetune.serving.app import make_app
    from finetune.serving.prompts import Limits
    from finetune.serving.service import Service
    from finetune.serving.worker import Worker
    from finetune.workflows.serving_models import models_to_serve, open_below

    settings = settings or ServerSettings()
    subject = find_subject(model=model, checkpoint=checkpoint, backend=backend, device=device)
    listener = server.listen(settings)
    with listener:
        models = models_to_serve(subject, name=name, adapters=adapters or {}, template=template, on_notice=on_notice)
        base, catalogue = models.base, models.catalogue
        opening = partial(open_session, base.config, base.source.path, models.adapters)
        worker = Worker(opening, max_batch=settings.max_batch)
        worker.start()
        opener = partial(open_below, base, catalogue.base.prompter)
        changes = Adapters(catalogue, worker, opener, settings.adapter_root)
        limits = Limits(base.source.context_length, settings.max_tokens, base.source.vocab_size)
        service = Service(catalogue, worker, changes, limits=limits, settings=settings, version=__version__)
        for warning in access_warnings(settings):
            on_notice(warning)
        on_notice(f"Serving {', '.join(catalogue.names)} on {server.address_of(listener)}. Ctrl-C stops.")
        stopped_by = server.run(make_app(service), worker, listener, settings)
    if stopped_by is None:
        raise FinetuneError("The server could not start. Its log says why.")
    raise StoppedBySignal("The server has stopped.", stopped_by)


def require_extra() -> None:
    """Raises UsageError where the libraries of the server are not installed."""
    missing = [library for library in NEEDED if importlib.util.find_spec(library) is None]
    if missing:
        raise UsageError(f"ft serve needs {', '.join(missing)}: pip install 'finetune[serve]'")


def access_warnings(settings: ServerSettings) -> list[str]:
    """What is risky about who can connect."""
    if settings.is_local or settings.api_keys:
        return []
    return [f"It has no API key: anybody who reaches {settings.host} can use it. Set FT_API_KEY or --api-key-file."]

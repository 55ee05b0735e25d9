"""A server in this process over a session that says what it is told to, and `ft serve` in another process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from tests.support.tiny_model import CHATML
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.core.errors import TrainingError, UsageError
from finetune.core.types import GenerationRequest, ParameterCount, RequestId, TokenEvent
from finetune.data.templates import choose_template
from finetune.data.tokenizer import TextTokenizer
from finetune.generation.prompts import Prompter
from finetune.serving.adapters import Adapters, OpenedAdapter
from finetune.serving.app import make_app
from finetune.serving.catalogue import Catalogue, ServedModel
from finetune.serving.prompts import Limits
from finetune.serving.service import Service
from finetune.serving.settings import ServerSettings
from finetune.serving.worker import Worker

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
CONTEXT = 512
VOCABULARY = 261
EOS = 257


@dataclass(eq=False)
class ScriptedSession:
    """Answers every prompt with a text, byte by byte. What stands in a prompt changes that:

    `forever` never ends, `crash` kills the engine, `no memory` fails as a full device does.
    """

    reply: str = "Hello world."
    pause: float = 0.0  # seconds of each step
    adapters: set[str] = field(default_factory=set)
    generators: list["ScriptedGenerator"] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)  # that have called anything
    closed: bool = False

    @property
    def parameters(self) -> ParameterCount:
        return ParameterCount(0, 0)

    def generator(self) -> "ScriptedGenerator":
        self.threads.add(threading.get_ident())
        self.generators.append(ScriptedGenerator(self))
        return self.generators[-1]

    def load_adapter(self, name: str, directory: Path) -> None:
        self.threads.add(threading.get_ident())
        if not (directory / "adapter_config.json").is_file():
            raise UsageError(f"{directory} is no adapter.")
        self.adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        self.threads.add(threading.get_ident())
        self.adapters.remove(name)

    def close(self) -> None:
        self.closed = True

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return sum(len(generator.requests) for generator in self.generators)

    @property
    def most(self) -> int:
        """Requests that held a slot together."""
        return max(generator.most for generator in self.generators)


class ScriptedGenerator:
    def __init__(self, session: ScriptedSession) -> None:
        self.session = session
        self.requests: dict[RequestId, tuple[GenerationRequest, Iterator[int]]] = {}
        self.seen: list[GenerationRequest] = []
        self.most = 0

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def add(self, request: GenerationRequest) -> RequestId:
        if request.adapter is not None and request.adapter not in self.session.adapters:
            raise UsageError(f"No adapter is called {request.adapter!r}.")
        self.seen.append(request)
        number = len(self.seen)
        self.requests[number] = (request, self._tokens(bytes(i for i in byte_values(request.prompt))))
        self.most = max(self.most, len(self.requests))
        return number

    def cancel(self, request: RequestId) -> None:
        self.requests.pop(request, None)

    def step(self) -> Sequence[TokenEvent]:
        self.session.threads.add(threading.get_ident())
        time.sleep(self.session.pause)
        return [self._event(number, *found) for number, found in list(self.requests.items())]

    def _tokens(self, prompt: bytes) -> Iterator[int]:
        if b"crash" in prompt:
            raise_later = RuntimeError("the device fell over")
            yield from self._failing(raise_later)
        if b"no memory" in prompt:
            yield from self._failing(TrainingError("Memory ran out. Ask for less at once."))
        while b"forever" in prompt:
            yield from byte_tokens("on and ")
        yield from byte_tokens(self.session.reply)
        yield EOS

    def _failing(self, error: Exception) -> Iterator[int]:
        raise error
        yield 0

    def _event(self, number: RequestId, request: GenerationRequest, tokens: Iterator[int]) -> TokenEvent:
        if request.constraint is not None:
            token = int(np.flatnonzero(request.constraint.allowed())[-1])
        else:
            token = next(tokens)
        top = tuple((token + i, -0.5 - i) for i in range(request.top_logprobs))
        if token in request.stop_tokens:
            del self.requests[number]
            return TokenEvent(number, None, -0.5, "stop", top)
        if request.constraint is not None:
            request.constraint.advance(token)
        produced = self._count(number)
        if produced == request.max_tokens:
            del self.requests[number]
            return TokenEvent(number, token, -0.5, "length", top)
        return TokenEvent(number, token, -0.5, None, top)

    def _count(self, number: RequestId) -> int:
        self._produced = getattr(self, "_produced", {})
        self._produced[number] = self._produced.get(number, 0) + 1
        return int(self._produced[number])


_TOKENIZER = tiny_tokenizer(chat_template=CHATML)


def byte_tokens(text: str) -> list[int]:
    return [int(token) for token in _TOKENIZER.encode(text)[0]]


def byte_values(prompt: Sequence[int]) -> bytes:
    return _TOKENIZER.decode(prompt).encode()


@dataclass
class Served:
    """A server that runs in a thread."""

    url: str
    session: ScriptedSession
    worker: Worker
    service: Service
    client: httpx.Client

    def post(self, path: str, body: Any = None, **arguments: Any) -> httpx.Response:
        return self.client.post(path, json=body, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.client.get(path, **arguments)

    def chat(self, content: str = "Hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat_body(content, **fields))


def chat_body(content: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": content}], **fields}


@contextmanager
def served(
    session: ScriptedSession | None = None,
    *,
    tokenizer: TextTokenizer | None = None,
    adapters: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Served]:
    """A server on a free port for as long as the block lasts."""
    session = session or ScriptedSession()
    session.adapters.update(adapters)
    options = ServerSettings(**settings)
    tokenizer = tokenizer or _TOKENIZER
    prompter = Prompter(tokenizer, None if tokenizer.chat_template is None else choose_template(None, tokenizer))
    catalogue = Catalogue(ServedModel("base", prompter, "base"), context_length=CONTEXT)
    for name in adapters:
        catalogue.add(ServedModel(name, prompter, name, adapter=name, parent="base"))

    @contextmanager
    def opened() -> Iterator[ScriptedSession]:
        yield session
        session.close()

    worker = Worker(opened, max_batch=options.max_batch)
    worker.start()
    changes = Adapters(catalogue, worker, lambda path, _root: OpenedAdapter(path, prompter), options.adapter_root)
    limits = Limits(CONTEXT, options.max_tokens, VOCABULARY)
    service = Service(catalogue, worker, changes, limits=limits, settings=options, version="test")
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None, access_log=False, lifespan="on"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, trust_env=False, verify=False, timeout=60) as client:
            yield Served(url, session, worker, service, client)
    finally:
        server.should_exit = True
        worker.stop()
        thread.join(timeout=10)
        listener.close()


def wait_until(holds: Any, seconds: float = 60.0) -> None:
    """Wait for something that another thread does. Fails with the condition where it never comes."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class ServeProcess:
    """`ft serve` as a person starts it, on a free port."""

    def __init__(self, *arguments: object, log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "finetune", "serve", *map(str, arguments), "--port", "0"]
        # Fixtures of a module start before the ones of a test, which isolate a process from the person.
        surroundings = {**os.environ, "PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1", **(env or {})}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=surroundings)
        self.url = self._ready()

    def _ready(self) -> str:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(r"Serving .* on (http://\S+?)\. ", self.text)
            if found:
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"the server did not start: {self.text}")

    @property
    def text(self) -> str:
        """Everything that it has said."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def __enter__(self) -> "ServeProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=30)

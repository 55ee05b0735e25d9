"""Runs an application on a socket until a signal comes, and ends what is under way in good order."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from finetune.core.errors import UsageError
from finetune.serving.settings import ServerSettings
from finetune.serving.worker import Worker

log = logging.getLogger("finetune.serving")

_SWITCH_SECONDS = 0.0005  # that the engine's thread may keep Python to itself while a request comes in


def listen(settings: ServerSettings) -> socket.socket:
    """Take the address, before anything is loaded. Raises UsageError where it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except (OSError, OverflowError, UnicodeError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"--host {settings.host} --port {settings.port}: this address cannot be used ({reason}). "
            "Choose another port, or stop the program that has it; --port 0 takes any free one."
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, whose first signal ends things within the grace period, and whose second ends them at once."""

    def __init__(self, app: FastAPI, worker: Worker, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.grace) + 5,
            h11_max_incomplete_event_size=64_000,
        )
        super().__init__(config)
        self.stopped_by: signal.Signals | None = None
        self._worker = worker
        self._grace = settings.grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.stopped_by = signal.Signals(sig)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers end by themselves for the grace period, then end them with an error each."""
        ending = asyncio.ensure_future(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._grace)
        log.warning("The grace period of %g s is over: the answers under way are ended.", self._grace)
        await asyncio.to_thread(self._worker.stop)


def run(app: FastAPI, worker: Worker, listener: socket.socket, settings: ServerSettings) -> signal.Signals | None:
    """Serve until a signal comes, which is returned."""
    server = Server(app, worker, settings)
    gc.collect()
    gc.freeze()  # what is loaded stays: walking it would hold up answers again and again
    sys.setswitchinterval(_SWITCH_SECONDS)
    server.run(sockets=[listener])
    worker.stop()
    return server.stopped_by

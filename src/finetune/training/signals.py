"""Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.core.errors import StoppedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody wants the run to stop. The loop reads it; a signal or another thread sets it."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal is not None

    def ask(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ask the run to save and stop. Exit code 128 + `number`."""
        self.signal = number


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into `request` inside the block, and put the former handlers back after it.

    Only the main thread may install handlers; elsewhere (a notebook's worker, a server) the caller's own ones
    stay and `request.ask()` is the way to stop. A second signal raises StoppedBySignal where the program stands:
    what was not saved since the last checkpoint is done again on resume.
    """
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.requested:
            raise StoppedBySignal("Stopped at once, without a new checkpoint.", number)
        request.ask(signal.Signals(number))

    former = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise StoppedBySignal where the program stands, as Ctrl-C raises KeyboardInterrupt.

    For what comes before the first step: there is nothing to save, but processes to end and files to delete.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        raise StoppedBySignal("Stopped by SIGTERM before the first step. Nothing was written.", number)

    former = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)

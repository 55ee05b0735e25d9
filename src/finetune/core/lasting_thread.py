"""A thread for an engine's work that lasts as long as the process, and the way out of a process that has one.

When a thread ends, MLX frees what it compiled there, which needs the interpreter; and Python ends threads that still
compute by unwinding them, C++ or not. Either one aborts a process that is ending at that moment.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


class LastingThread(threading.Thread):
    """Does its work in the background, then rests: it does not end before the process does."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.over = threading.Event()  # the work has ended, well or not

    def run(self) -> None:
        """What the thread does."""
        try:
            self._work()
        except BaseException:  # told as of any thread, which would end here
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self)))
        self.over.set()
        threading.Event().wait()


def leave_process(code: int) -> NoReturn:
    """Exit with a status; at once where a lasting thread still works, as that of a server which opens its model."""
    if any(isinstance(thread, LastingThread) and not thread.over.is_set() for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

"""How far the work on large data is, for whoever wants to show it.

What prepares data lies several calls below what talks to a person, so the listener is not handed down: `watched` sets
it for a block, and without one nobody listens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """`share` of `what` is done, 0 to 1; None: not known. `rows` are done."""

    what: str
    rows: int
    share: float | None
    done: bool = False  # with the last one


Watcher: TypeAlias = Callable[[Progress], None]

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` what goes on within the block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(progress: Progress) -> None:
    """Say how far it is."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(progress)

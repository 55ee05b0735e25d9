"""A computation that stops on its way and goes on later, while something else is computed in between.

It stays on its thread, for which PyTorch keeps workers: what runs on another one would start workers of its own. And it
may stop in the middle of calls, as a library's model computes its layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from greenlet import getcurrent, greenlet

Result = TypeVar("Result")


class Pausing(Generic[Result]):
    """Calls `compute` with a function that stops it. One that is dropped half done ends as an exception ends it."""

    def __init__(self, compute: Callable[[Callable[[], None]], Result]) -> None:
        self._run = greenlet(partial(compute, _pause))
        self._result: Result

    def go_on(self) -> bool:
        """Compute up to the next pause; whether the end was reached. Raises what the computation raises."""
        self._run.parent = getcurrent()
        result = self._run.switch()
        if self._run.dead:
            self._result = result
        return bool(self._run.dead)

    @property
    def result(self) -> Result:
        """What was computed, once the end was reached."""
        return self._result


def _pause() -> None:
    """No method: what waits must not keep the object that would go on."""
    getcurrent().parent.switch()

"""Notices an engine that does not come back from what it does."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from finetune.core.types import GenerationRequest
from finetune.engines.decoding import PREFILL_TOKENS

# Far more than steps take: a slow processor reads some tokens a second of the largest models that fit its memory.
STEP_SECONDS = 60.0
TOKEN_SECONDS = 1.0  # more for each token that a step may read
CALL_SECONDS = 900.0  # for loading or unloading an adapter, whose files may be far away


class Watch:
    """Says whether something takes longer than it may. Written by one thread, read by any."""

    def __init__(self) -> None:
        self._due: float | None = None  # on the monotonic clock; None: nothing is under way

    @contextmanager
    def over(self, seconds: float) -> Iterator[None]:
        """What is done inside may take so long."""
        self._due = time.monotonic() + seconds
        try:
            yield
        finally:
            self._due = None

    @property
    def overdue(self) -> bool:
        """Whether something has been under way for longer than it may."""
        due = self._due
        return due is not None and time.monotonic() > due


def step_seconds(active: Iterable[GenerationRequest]) -> float:
    """How long one step with these requests may take: it grows with the tokens that it may read."""
    prompts = [len(request.prompt) for request in active]
    return STEP_SECONDS + TOKEN_SECONDS * (min(sum(prompts), PREFILL_TOKENS) + len(prompts))

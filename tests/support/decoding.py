"""Runs a generator to its end, or to its next tokens."""

from collections.abc import Sequence

from finetune.core.types import GenerationRequest, TokenEvent
from finetune.engines.base import Generator


def decode(generator: Generator, *requests: GenerationRequest) -> list[list[int]]:
    """Run the requests together; the tokens of each."""
    ids = [generator.add(request) for request in requests]
    tokens: dict[int, list[int]] = {identifier: [] for identifier in ids}
    while generator.busy:
        for event in generator.step():
            if event.token is not None:
                tokens[event.request].append(event.token)
    return [tokens[identifier] for identifier in ids]


def next_events(generator: Generator) -> Sequence[TokenEvent]:
    """The next events: a step may compute a part of what they need, and give none."""
    while generator.busy:
        if events := generator.step():
            return events
    return []

"""Which requests are under way together, and whose prompt is read next.

A step reads a bounded number of prompt tokens and then decodes one token of every row, so a long prompt delays the
others by no more than that bound. Requests are admitted in the order in which they came.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.core.types import GenerationRequest
from finetune.models.architecture import read_architecture

CACHE_BYTES = 4 << 30  # of keys and values of what is under way


class Limits(NamedTuple):
    """What is under way at once."""

    rows: int = 32
    cache_tokens: int = 1 << 18  # places for keys and values: rows times the longest of them


def limits_for(config: Mapping[str, Any], value_bytes: int) -> Limits:
    """The limits for a model of this config.json, whose keys and values have `value_bytes` bytes each."""
    architecture = read_architecture(config)
    if architecture is None:
        return Limits()
    token_bytes = 2 * architecture.layers * architecture.kv_width * value_bytes
    return Limits(cache_tokens=CACHE_BYTES // token_bytes)


PARTS = 4  # of the layers, between which a step on a CPU can be interrupted


def between_parts(layers: int) -> list[int]:
    """The layers before which a part of a step ends."""
    return sorted({part * layers // PARTS for part in range(1, PARTS)} - {0})


class Share(NamedTuple):
    """A part of a step's reading: how many tokens of the prompt of which row."""

    row: int
    tokens: int


def fits(request: GenerationRequest, active: Sequence[GenerationRequest], limits: Limits) -> bool:
    """Whether a request may join those under way; one alone always may."""
    if not active:
        return True
    rows = len(active) + 1
    longest = max(len(one.prompt) + one.max_tokens for one in (request, *active))
    return rows <= limits.rows and rows * longest <= limits.cache_tokens


def next_share(remaining: Sequence[int], budget: int, slack: int, *, first: bool) -> Share:
    """Whose prompt is read next, of unread lengths in the order of arrival, with `budget` tokens left in the step.

    A step first gives half of its tokens to the prompt that came first, so that it ends some time, and then the rest
    to the shortest, so that it does not wait for a long one. Up to `slack` tokens more are read where a prompt ends
    with them: a pass for a few tokens takes as long as one for many.
    """
    if first:
        half = budget if len(remaining) == 1 else max(1, budget // 2)
        return Share(0, _part(remaining[0], half, slack))
    shortest = min(range(len(remaining)), key=remaining.__getitem__)
    return Share(shortest, _part(remaining[shortest], budget, slack))


def _part(rest: int, budget: int, slack: int) -> int:
    return rest if rest <= budget + slack else budget

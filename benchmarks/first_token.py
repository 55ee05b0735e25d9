"""Seconds to the first text of an answer: of a request alone, of one that joins others, of some in the same moment."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from benchmarks.servers import ADAPTERS, Side, body

REQUESTS = 4
PROMPTS = 1 + 2 * REQUESTS  # of one try
CANDIDATES = 4  # for each of them
KINDS = ("short", "long", "shared")
_COMMON = -100  # where the shared beginning is taken from: after it, answers begin with text
_LONG = 10  # texts of the workload in a long prompt, or in the beginning that prompts share


@dataclass(frozen=True, slots=True)
class Kind:
    """Prompts of one kind, each different from all others from its first word on."""

    name: str
    prompts: Sequence[str]
    system: str = ""  # what all of them begin with


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Medians over the tries, in seconds; in each try the three are measured in turn."""

    prompt_tokens: float
    alone: float
    joining: float  # while REQUESTS - 1 others decode
    together: float  # the median of REQUESTS that come in the same moment
    joining_to_alone: float
    together_to_alone: float


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a client saw of one answer."""

    seconds: float
    prompt_tokens: int


def kinds_of(texts: Sequence[str], tries: int) -> list[Kind]:
    """The kinds that are measured, from texts of the workload: short ones, many in one, some that begin alike.

    Each has more prompts than are needed, of which `answered` takes some.
    """
    count = CANDIDATES * tries * PROMPTS
    long = [f"{number}. {' '.join(texts[number : number + _LONG])}" for number in range(count)]
    common = " ".join(texts[_COMMON : _COMMON + _LONG])
    return [Kind("short", texts[:count]), Kind("long", long), Kind("shared", texts[count : 2 * count], common)]


async def answered(side: Side, kind: Kind, tries: int) -> Kind:
    """As many prompts as `tries` need, of those that are answered with text from the first token on.

    With random weights many an answer begins with tokens that are no text, and a client sees nothing of them.
    """
    wanted: list[str] = []
    async with httpx.AsyncClient(base_url=side.url, timeout=600, trust_env=False) as client:
        for prompt in kind.prompts:
            asked = body(side, ADAPTERS[0], prompt, tokens=1, system=kind.system)
            response = await client.post("/v1/chat/completions", json=asked)
            if response.raise_for_status().json()["choices"][0]["message"]["content"]:
                wanted.append(prompt)
            if len(wanted) == tries * PROMPTS:
                return Kind(kind.name, wanted, kind.system)
    raise SystemExit(f"Too few {kind.name} prompts are answered with text: {len(wanted)} for {tries} tries.")


def measure(side: Side, kind: Kind, tries: int) -> FirstTokens:
    """All three figures of one kind."""
    return asyncio.run(_measured(side, kind, tries))


async def _measured(side: Side, kind: Kind, tries: int) -> FirstTokens:
    prompts = iter(kind.prompts)
    alone, joining, together, tokens = [], [], [], []
    async with httpx.AsyncClient(base_url=side.url, timeout=600, trust_env=False) as client:
        asking = _Asking(client, side, kind.system)
        await asking.first_token("Before the first.")  # what prompts share is read once, before they are counted
        for _ in range(tries):
            seen = await asking.first_token(next(prompts))
            alone.append(seen.seconds)
            tokens.append(seen.prompt_tokens)
            group = await asyncio.gather(*(asking.first_token(prompt) for prompt in _take(prompts, REQUESTS)))
            together.append(median(one.seconds for one in group))
            joining.append(await asking.joining(_take(prompts, REQUESTS)))
    lone = median(alone)
    return FirstTokens(
        prompt_tokens=median(tokens),
        alone=lone,
        joining=median(joining),
        together=median(together),
        joining_to_alone=median(joining) / lone,
        together_to_alone=median(together) / lone,
    )


def _take(prompts: Iterator[str], count: int) -> list[str]:
    return [next(prompts) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class _Asking:
    """A client of one server, with what all of its conversations begin with."""

    client: httpx.AsyncClient
    side: Side
    system: str

    async def first_token(self, prompt: str, *, tokens: int = 8, ready: asyncio.Event | None = None) -> _Seen:
        """Ask and read the answer to its end; `ready` is set at the first text."""
        asked = body(self.side, ADAPTERS[0], prompt, tokens=tokens, stream=True, system=self.system)
        asked["stream_options"] = {"include_usage": True}
        began, first, prompt_tokens = time.perf_counter(), 0.0, 0
        async with self.client.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                document = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if not first and has_text(document):
                    first = time.perf_counter() - began
                    if ready is not None:
                        ready.set()
                if document.get("usage"):
                    prompt_tokens = document["usage"]["prompt_tokens"]
        if not first:
            raise SystemExit(f"{self.side.name} answered without text: {prompt[:80]}")
        return _Seen(first, prompt_tokens)

    async def joining(self, prompts: Sequence[str]) -> float:
        """Seconds of the last prompt, while the answers to the others are being decoded."""
        events = [asyncio.Event() for _ in prompts[:-1]]
        others = [
            asyncio.ensure_future(self.first_token(prompt, tokens=400, ready=event))
            for prompt, event in zip(prompts, events, strict=False)
        ]
        await asyncio.gather(*(event.wait() for event in events))
        seen = await self.first_token(prompts[-1])
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.3)  # until the server has noticed
        return seen.seconds


def has_text(document: dict[str, Any]) -> bool:
    """Whether a document of a stream carries text of the answer."""
    choices = document.get("choices")
    return bool(choices and choices[0]["delta"].get("content"))

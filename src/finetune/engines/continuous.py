"""Continuous batching: requests join and leave between the steps of one batch that decodes all of them.

What is under way when, what an event says and which prefixes are kept is decided here, once. An engine brings the
arrays (`RowBatch`): caches of keys and values, one row for each request, and one forward pass over all rows.

A prompt is read up to its last token, a part at a time. Then its row joins the batch, which may read what is left of
the prompts of new rows in passes of their own: their first tokens then come before the next tokens of the others, even
before those that are half computed. How much may be read between two tokens of a row is bounded.
"""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from finetune.core.types import BoolArray, GenerationRequest, RequestId, TokenEvent
from finetune.engines import decoding
from finetune.engines.decoding import check_request
from finetune.engines.prefixes import PrefixCache
from finetune.engines.scheduling import Limits, fits, next_share

Cache = TypeVar("Cache")


class CacheSize(NamedTuple):
    """What keeping a cache costs, and how short it can be cut."""

    size: int  # bytes
    shortest: int = 0  # the fewest of its first tokens that it can be cut to


class Choice(NamedTuple):
    """The next token of one row."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # as many as the request asks for, best first


class Choices(Protocol):
    """Tokens that the device is choosing."""

    @property
    def rows(self) -> Sequence[int]:
        """The rows of the batch, in its order of the moment, that get one."""
        ...

    def done(self) -> bool:
        """Whether the rest is `result`'s to wait for; otherwise a part of it has been computed by this call."""
        ...

    def result(self) -> Sequence[Choice]:
        """One for each of `rows`. Waits for the device."""
        ...


class RowBatch(Protocol[Cache]):
    """The arrays of decoding. A `Cache` holds keys and values of one row, which its adapter has read."""

    works_ahead: bool  # whether the device computes while Python goes on

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        ...

    def adapter(self, name: str | None) -> Hashable:
        """What tells this adapter from all others, also from one loaded later under its name; None is the base.

        Raises UsageError where no such adapter is loaded.
        """
        ...

    def start(self, adapter: Any, begun: Cache | None, length: int) -> Cache:
        """A cache for a new row: empty, or with the first `length` tokens of `begun`, which stays as it is."""
        ...

    def read(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Let a row that has not joined read a part of its prompt, now or in a later pass."""
        ...

    def join(self, cache: Cache, request: GenerationRequest) -> None:
        """Add a row behind the others, which has been given all of the prompt but its last token to read.

        What `cache` stands for stays as it is.
        """
        ...

    def leave(self, index: int) -> None:
        """Remove a row; the last row takes its place."""
        ...

    def begin(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Choices | None:
        """Start choosing the first tokens of rows that have just joined, in a pass of their own, or None: they wait.

        Tokens of the other rows may be half chosen. The arguments are those of `decode`; `allowed` is of new rows.
        """
        ...

    def decode(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Choices:
        """Start choosing the next tokens of all rows but new ones that wait for others to read their prompts.

        `numbers` counts each row's tokens from 0; `allowed` [V] is given for the rows with a constraint.
        """
        ...

    def copy(self, index: int) -> Cache:
        """The cache of a row of the batch, independent of it."""
        ...

    def size(self, cache: Cache) -> CacheSize:
        """What keeping a cache costs."""
        ...


def of_places(allowed: Mapping[int, BoolArray], places: Sequence[int]) -> dict[int, BoolArray]:
    """What is allowed to the rows at these places, by the order of the places."""
    return {number: allowed[place] for number, place in enumerate(places) if place in allowed}


@dataclass(slots=True, eq=False)
class _Row(Generic[Cache]):
    """One request: waiting, reading its prompt, decoding or over."""

    number: RequestId
    request: GenerationRequest
    adapter: Hashable
    cache: Cache | None = None  # while it reads
    read: int = 0  # tokens of the prompt
    scheduled: int = 0  # tokens that were chosen or are being chosen
    tokens: list[int] = field(default_factory=list)  # chosen ones, a stop token included
    over: bool = False

    @property
    def unread(self) -> int:
        """Tokens of the prompt to read before the row joins the batch."""
        return len(self.request.prompt) - 1 - self.read


class _Pending(NamedTuple, Generic[Cache]):
    """Tokens that are being chosen, and the rows that they belong to."""

    rows: list[_Row[Cache]]
    choices: Choices
    whole: bool  # whether all rows get one

    @property
    def first(self) -> bool:
        """Whether nobody has got a token before these."""
        return not any(row.tokens for row in self.rows)


class ContinuousGenerator(Generic[Cache]):
    """Implements `Generator` over an engine's rows. `prefixes` may be shared by generators over the same weights."""

    def __init__(self, batch: RowBatch[Cache], prefixes: PrefixCache[Cache], limits: Limits | None = None) -> None:
        self._batch = batch
        self._prefixes = prefixes
        self._limits = limits or Limits()
        self._numbers = count()
        self._waiting: deque[_Row[Cache]] = deque()
        self._reading: list[_Row[Cache]] = []
        self._decoding: list[_Row[Cache]] = []  # in the order of the batch's rows
        self._pending: deque[_Pending[Cache]] = deque()  # in the order in which they are handed out
        self._unspent = decoding.PREFILL_TOKENS  # of prompts, to be read before rows that decode get their next tokens

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._decoding or self._pending)

    def add(self, request: GenerationRequest) -> RequestId:
        check_request(request, self._batch.vocabulary)
        row: _Row[Cache] = _Row(next(self._numbers), request, self._batch.adapter(request.adapter))
        self._waiting.append(row)
        return row.number

    def cancel(self, request: RequestId) -> None:
        pending = [row for pending in self._pending for row in pending.rows]
        for row in (*self._waiting, *self._reading, *self._decoding, *pending):
            if row.number == request:
                self._end(row)

    def step(self) -> Sequence[TokenEvent]:
        try:
            return self._step()
        except BaseException:  # also Ctrl-C: what is half computed is of no use to anybody
            self._prefixes.clear()
            for under_way in (self._waiting, self._reading, self._decoding, self._pending):
                under_way.clear()
            raise

    def _step(self) -> list[TokenEvent]:
        self._admit()
        self._read_prompts()
        self._start()
        if not self._pending or not self._pending[0].choices.done():
            return []
        pending = self._pending.popleft()
        if pending.whole:
            self._unspent = decoding.PREFILL_TOKENS
        if self._works_ahead(pending):
            self._decode()
        return self._hand_out(pending)

    def _start(self) -> None:
        """Start choosing tokens: first ones as soon as there are new rows, and others where nothing is under way."""
        new = [row for row in self._decoding if not row.scheduled]
        begun = self._batch.begin(*self._asked(new)) if new else None
        if begun and self._batch.works_ahead:
            self._pending.append(self._scheduled(begun))
        elif begun:
            self._pending.appendleft(self._scheduled(begun))  # what is half computed waits
        elif not self._pending:
            self._decode()

    def _works_ahead(self, pending: _Pending[Cache]) -> bool:
        """Whether the device goes on while these tokens are handed out.

        First tokens wait for nothing else, and a constraint says what may follow when it knows what went before.
        """
        alone = not self._pending and not pending.first
        return self._batch.works_ahead and alone and not any(row.request.constraint for row in self._decoding)

    def _admit(self) -> None:
        active = [row.request for row in (*self._reading, *self._decoding)]
        while self._waiting and fits(self._waiting[0].request, active, self._limits):
            row = self._waiting.popleft()
            active.append(row.request)
            self._reading.append(row)

    def _read_prompts(self) -> None:
        left, slack, first = self._unspent, decoding.PREFILL_TOKENS // 8, True
        while self._reading and left > slack:
            index, tokens = next_share([row.unread for row in self._reading], left, slack, first=first)
            left, first = left - self._read(self._reading[index], tokens), False
        if any(row.scheduled for row in self._decoding):  # else nobody is held up
            self._unspent = left

    def _read(self, row: _Row[Cache], tokens: int) -> int:
        """Read up to so many tokens of a prompt, and join the batch after the last; how many were read."""
        prompt = row.request.prompt
        if row.cache is None:
            found = self._prefixes.find(row.adapter, prompt[:-1])
            begun, row.read = found or (None, 0)
            row.cache = self._batch.start(row.adapter, begun, row.read)
        part = prompt[row.read : min(row.read + tokens, len(prompt) - 1)]
        if part:
            self._batch.read(row.cache, part)
            row.read += len(part)
        if not row.unread:
            self._join(row, row.cache)
        return len(part)

    def _join(self, row: _Row[Cache], cache: Cache) -> None:
        self._batch.join(cache, row.request)
        self._store(row, cache, row.read)
        row.cache = None
        self._reading.remove(row)
        self._decoding.append(row)

    def _decode(self) -> None:
        """Start choosing the next token of every row that wants one."""
        for row in [row for row in reversed(self._decoding) if row.scheduled == row.request.max_tokens]:
            self._leave(row)  # the last one first: nobody has to take its place
        if self._decoding:
            self._pending.append(self._scheduled(self._batch.decode(*self._asked(self._decoding))))
        else:
            self._unspent = decoding.PREFILL_TOKENS  # nobody is held up

    def _asked(self, wanted: Sequence[_Row[Cache]]) -> tuple[list[int], dict[int, BoolArray]]:
        """What rows ask of their next tokens: the number of each in the batch, and what constraints of some allow."""
        rows = [(i, row.request.constraint) for i, row in enumerate(self._decoding) if row in wanted]
        allowed = {i: constraint.allowed() for i, constraint in rows if constraint}
        return [row.scheduled for row in self._decoding], allowed

    def _scheduled(self, choices: Choices) -> _Pending[Cache]:
        """Tokens that are being chosen from here on."""
        rows = [self._decoding[index] for index in choices.rows]
        pending = _Pending(rows, choices, whole=len(rows) == len(self._decoding))
        for row in pending.rows:
            row.scheduled += 1
        return pending

    def _hand_out(self, pending: _Pending[Cache]) -> list[TokenEvent]:
        """The events of tokens that were being chosen; rows that ended or were cancelled meanwhile have none."""
        chosen = zip(pending.rows, pending.choices.result(), strict=True)
        return [self._event(row, choice) for row, choice in chosen if not row.over]

    def _event(self, row: _Row[Cache], choice: Choice) -> TokenEvent:
        row.tokens.append(choice.token)
        if choice.token in row.request.stop_tokens:
            self._end(row)
            return TokenEvent(row.number, None, choice.logprob, "stop", choice.top)
        if row.request.constraint:
            row.request.constraint.advance(choice.token)
        if len(row.tokens) == row.request.max_tokens:
            self._end(row)
            return TokenEvent(row.number, choice.token, choice.logprob, "length", choice.top)
        return TokenEvent(row.number, choice.token, choice.logprob, None, choice.top)

    def _end(self, row: _Row[Cache]) -> None:
        row.over = True
        if row in self._waiting:
            self._waiting.remove(row)
        elif row in self._reading:
            self._reading.remove(row)
        elif row in self._decoding:
            self._leave(row)

    def _leave(self, row: _Row[Cache]) -> None:
        """Take a row out of the batch, and keep what it has read: each scheduled token made it read one more."""
        index = self._decoding.index(row)
        self._store(row, self._batch.copy(index), len(row.request.prompt) - 1 + row.scheduled)
        self._batch.leave(index)
        self._decoding[index] = self._decoding[-1]
        self._decoding.pop()

    def _store(self, row: _Row[Cache], cache: Cache, length: int) -> None:
        size, shortest = self._batch.size(cache)
        tokens = (*row.request.prompt, *row.tokens)[:length]
        self._prefixes.store(row.adapter, tokens, cache, size=size, shortest=shortest)

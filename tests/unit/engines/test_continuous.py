"""Requests that join and leave one batch, over rows that only remember what they were told."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from finetune.core.types import BoolArray, GenerationRequest, TokenEvent
from finetune.engines.continuous import CacheSize, Choice, ContinuousGenerator
from finetune.engines.prefixes import PrefixCache
from finetune.engines.scheduling import Limits

V = 1000
PROMPT = (10, 20, 30, 40, 50)


@dataclass
class Tape:
    """A cache: the tokens that a row has read."""

    adapter: Hashable
    tokens: list[int]


@dataclass
class Chosen:
    rows: Sequence[int]
    choices: list[Choice]

    def done(self) -> bool:
        return True

    def result(self) -> list[Choice]:
        return self.choices


@dataclass
class TapeBatch:
    """RowBatch whose next token is the sum of all tokens read, modulo V: a wrong cache shows in every later token."""

    vocabulary: int = V
    works_ahead: bool = True
    begins: bool = False  # whether a new row gets its first token in a pass of its own
    tapes: list[Tape] = field(default_factory=list)
    newest: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)  # lengths of what `read` was given
    rows_at_most: int = 0

    def adapter(self, name: str | None) -> Hashable:
        return name

    def start(self, adapter: Hashable, begun: Tape | None, length: int) -> Tape:
        return Tape(adapter, list(begun.tokens[:length]) if begun else [])

    def read(self, cache: Tape, tokens: Sequence[int]) -> None:
        self.parts.append(len(tokens))
        cache.tokens += tokens

    def join(self, cache: Tape, request: GenerationRequest) -> None:
        self.tapes.append(Tape(cache.adapter, list(cache.tokens)))
        self.newest.append(request.prompt[-1])

    def leave(self, index: int) -> None:
        for rows in (self.tapes, self.newest):
            rows[index] = rows[-1]
            rows.pop()

    def begin(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen | None:
        new = [row for row, number in enumerate(numbers) if number == 0]
        return self._chosen(new[:1], allowed) if self.begins else None

    def decode(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        self.rows_at_most = max(self.rows_at_most, len(self.tapes))
        return self._chosen(range(len(self.tapes)), allowed)

    def _chosen(self, rows: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        choices = []
        for row in rows:
            tape = self.tapes[row]
            tape.tokens.append(self.newest[row])
            token = (sum(tape.tokens) + (tape.adapter == "other")) % V
            if row in allowed:
                token = int(np.flatnonzero(allowed[row])[0])
            self.newest[row] = token
            choices.append(Choice(token, 0.0))
        return Chosen(rows, choices)

    def copy(self, index: int) -> Tape:
        return Tape(self.tapes[index].adapter, list(self.tapes[index].tokens))

    def size(self, cache: Tape) -> CacheSize:
        return CacheSize(len(cache.tokens))


def expected(request: GenerationRequest) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append((sum(tokens) + (request.adapter == "other")) % V)
        if tokens[-1] in request.stop_tokens:
            break
    return tokens[len(request.prompt) :]


def generator(
    batch: TapeBatch | None = None, prefixes: PrefixCache[Tape] | None = None, **limits: int
) -> ContinuousGenerator[Tape]:
    return ContinuousGenerator(batch or TapeBatch(), PrefixCache() if prefixes is None else prefixes, Limits(**limits))


def finish(generator: ContinuousGenerator[Tape]) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while generator.busy:
        events += generator.step()
    return events


def tokens_of(events: list[TokenEvent], number: int) -> list[int | None]:
    return [event.token for event in events if event.request == number]


REQUESTS = [
    GenerationRequest(PROMPT, 6),
    GenerationRequest((7,), 3),
    GenerationRequest(PROMPT[:2], 9, adapter="other"),
    GenerationRequest(tuple(range(1, 40)), 5),
    GenerationRequest(PROMPT, 1),
]


def test_requests_together_get_what_each_gets_alone() -> None:
    together = generator()
    numbers = [together.add(request) for request in REQUESTS]
    events = finish(together)
    assert [tokens_of(events, number) for number in numbers] == [expected(request) for request in REQUESTS]
    assert [event.finish_reason for event in events].count("length") == len(REQUESTS)


def test_requests_may_join_while_others_decode() -> None:
    joined, numbers, events = generator(), [], []
    for request in REQUESTS:
        numbers.append(joined.add(request))
        events += [*joined.step(), *joined.step()]
    events += finish(joined)
    assert [tokens_of(events, number) for number in numbers] == [expected(request) for request in REQUESTS]


def test_a_cancelled_request_disturbs_nobody() -> None:
    for steps in range(5):
        batch = TapeBatch()
        together = generator(batch)
        dropped, *kept = [together.add(request) for request in REQUESTS]
        events = [event for _ in range(steps) for event in together.step()]
        together.cancel(dropped)
        later = finish(together)
        assert not tokens_of(later, dropped)
        assert [tokens_of([*events, *later], number) for number in kept] == [expected(one) for one in REQUESTS[1:]]
        assert batch.tapes == []


def test_a_stop_token_ends_a_row_and_is_not_handed_out() -> None:
    stop = expected(REQUESTS[0])[2]
    together = generator()
    first = together.add(GenerationRequest(PROMPT, 6, stop_tokens=frozenset({stop})))
    second = together.add(REQUESTS[2])
    events = finish(together)
    assert tokens_of(events, first) == [*expected(REQUESTS[0])[:2], None]
    assert tokens_of(events, second) == expected(REQUESTS[2])


def test_no_more_rows_decode_together_than_the_limit() -> None:
    batch = TapeBatch()
    limited = generator(batch, rows=2)
    numbers = [limited.add(request) for request in REQUESTS]
    events = finish(limited)
    assert [tokens_of(events, number) for number in numbers] == [expected(request) for request in REQUESTS]
    assert batch.rows_at_most == 2


def test_a_long_prompt_is_read_in_parts_while_others_get_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 4)
    together = generator()
    short = together.add(GenerationRequest((7,), 10))
    together.step()
    long = GenerationRequest(tuple(range(1, 40)), 3)
    number = together.add(long)
    events = [event for _ in range(6) for event in together.step()]
    assert {event.request for event in events} == {short}
    assert len(events) == 6
    assert tokens_of(finish(together), number) == expected(long)


def test_prompts_that_come_before_anybody_decodes_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who joins when they have just been read need not wait until all of them have a token."""
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)
    batch = TapeBatch(works_ahead=False, begins=True)
    together = generator(batch)
    for first in (100, 200, 300, 400):
        together.add(GenerationRequest(tuple(range(first, first + 6)), 9))
        if first > 200:
            together.step()
    assert batch.parts == [5, 5, 5, 5]


def test_what_is_left_of_a_step_is_not_spent_on_a_few_tokens_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for a few tokens takes as long as one for many."""
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)
    batch = TapeBatch()
    together = generator(batch)
    together.add(GenerationRequest(PROMPT, 40))
    together.step()
    for first, unread in ((100, 9), (200, 6), (300, 8)):
        together.add(GenerationRequest(tuple(range(first, first + unread + 1)), 9))
    finish(together)
    assert batch.parts == [4, 9, 6, 8]  # one more than half of 16, and the last prompt not by one and then seven


def test_the_next_turn_of_a_chat_reads_only_what_is_new() -> None:
    batch = TapeBatch()
    chat = generator(batch)
    chat.add(REQUESTS[0])
    answer = [event.token for event in finish(chat)]
    turn = GenerationRequest((*PROMPT, *answer, 5, 6, 7), 4)  # type: ignore[arg-type]
    number = chat.add(turn)
    assert tokens_of(finish(chat), number) == expected(turn)
    assert batch.parts == [4, 3]  # the last token of an answer and of a prompt is read by the batch, or not at all


def test_a_common_beginning_is_read_once_for_each_adapter() -> None:
    batch = TapeBatch()
    together = generator(batch)
    head = tuple(range(1, 30))
    requests = [GenerationRequest((*head, tail), 3, adapter=name) for name in (None, "other") for tail in (50, 60, 70)]
    numbers = [together.add(request) for request in requests]
    events = finish(together)
    assert [tokens_of(events, number) for number in numbers] == [expected(request) for request in requests]
    assert sum(batch.parts) == 2 * len(head)


def test_what_a_constraint_allows_follows_from_the_tokens_so_far() -> None:
    class Counting:
        """Allows the token after the last one."""

        def __init__(self) -> None:
            self.seen: list[int] = []

        def allowed(self) -> BoolArray:
            return np.arange(V) == (self.seen[-1] if self.seen else 99) + 1

        def advance(self, token: int) -> None:
            self.seen.append(token)

    constraint = Counting()
    together = generator()
    free = together.add(REQUESTS[2])
    together.step()
    bound = together.add(GenerationRequest(PROMPT, 4, constraint=constraint))
    events = finish(together)
    assert tokens_of(events, bound) == [100, 101, 102, 103] == constraint.seen
    assert tokens_of(events, free) == expected(REQUESTS[2])[1:]


def test_a_step_that_fails_leaves_no_request_and_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_batch: TapeBatch, _numbers: Sequence[int], _allowed: Mapping[int, BoolArray]) -> Chosen:
        raise KeyboardInterrupt

    prefixes: PrefixCache[Tape] = PrefixCache()
    broken = generator(prefixes=prefixes)
    number = broken.add(REQUESTS[0])
    monkeypatch.setattr(TapeBatch, "decode", fails)
    with pytest.raises(KeyboardInterrupt):
        broken.step()
    assert (broken.busy, len(prefixes), prefixes.size) == (False, 0, 0)
    broken.cancel(number)

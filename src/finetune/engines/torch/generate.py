"""The rows of a batch that decodes: their caches, one forward pass for all of them, the choice of their tokens.

Parts of prompts are not read at once but with the next tokens of the rows, in one forward pass: a request that has
just come costs no pass of its own, and its first token comes out of the pass that reads its prompt. On the CPU, long
prompts that come together are read in passes one after the other, so that the first need not wait for the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.core.types import BoolArray, GenerationRequest
from finetune.engines import decoding
from finetune.engines.continuous import CacheSize, Choice, ContinuousGenerator, of_places
from finetune.engines.prefixes import PrefixCache
from finetune.engines.scheduling import limits_for
from finetune.engines.torch.cache import CachedRow, SharedCaches, row_alone, with_room
from finetune.engines.torch.device import explained_memory
from finetune.engines.torch.ragged import Chunk, NewestTokens, Part, RaggedRows
from finetune.engines.torch.resident import AdaptedModel, LoadedAdapter
from finetune.engines.torch.sampling import SampledRow, Spoken, choose, spoken_of

_READ_AGAIN = 16  # tokens that two requests share and nobody has read: reading them twice takes less than a pass does
_READ_TOGETHER = 192  # tokens of prompts; with more in one pass a CPU takes no less time for each


@dataclass(slots=True, eq=False)
class Prompt:
    """What one request has read that is not in the batch, or what is kept of it for later ones."""

    adapter: LoadedAdapter
    place: CachedRow
    unread: list[int] = field(default_factory=list)  # tokens that the next forward pass reads
    own: bool = True  # whether `place` is this prompt's, to be written to

    def make_room(self, tokens: int) -> None:
        """Let so many tokens fit, in a place of its own."""
        if self.own:
            self.place = with_room(self.place, tokens)
        else:
            self.place, self.own = row_alone(tokens, self.place.layers(), self.place.length), True


@dataclass(slots=True, eq=False)
class _Row:
    """One request that decodes. `prompt` is there until its first forward pass, `place` from then on."""

    request: GenerationRequest
    adapter: LoadedAdapter
    newest: int  # the token that the model has not read
    spoken: Spoken | None
    prompt: Prompt | None = None
    place: CachedRow | None = None  # in the shared caches


@dataclass(slots=True)
class _Pass:
    """The tokens of one forward pass, part by part."""

    parts: list[Part] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    adapters: list[LoadedAdapter] = field(default_factory=list)

    def add_newest(self, row: _Row, position: int) -> int:
        """One token of a row; its place in the pass. The part that it belongs to is added by the caller."""
        self.tokens.append(row.newest)
        self.positions.append(position)
        self.adapters.append(row.adapter)
        return len(self.tokens) - 1

    def add_chunk(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        """Tokens behind what a prompt has read; the place of the last one in the pass."""
        prompt.make_room(prompt.place.length + len(tokens))
        first = prompt.place.length
        self.parts.append(Chunk(prompt.place, len(tokens)))
        self.tokens += tokens
        self.positions += range(first, first + len(tokens))
        self.adapters += [prompt.adapter] * len(tokens)
        return len(self.tokens) - 1


def make_generator(model: AdaptedModel, prefixes: PrefixCache[Prompt] | None = None) -> ContinuousGenerator[Prompt]:
    """A generator over a model; `prefixes` outlive it, as long as its weights stay."""
    limits = limits_for(model.base.config.to_dict(), model.base.dtype.itemsize)
    return ContinuousGenerator(TorchRows(model), PrefixCache() if prefixes is None else prefixes, limits)


class Chosen(NamedTuple):
    """Implements `Choices`: the tokens are there already."""

    rows: Sequence[int]
    choices: Sequence[Choice]

    def done(self) -> bool:
        return True

    def result(self) -> Sequence[Choice]:
        return self.choices


class TorchRows:
    """Implements `RowBatch`."""

    works_ahead = False  # Python launches each operation: while it waits for tokens nothing could be computed

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._rows: list[_Row] = []
        self._shared = SharedCaches()
        self._pending: dict[Prompt, None] = {}  # those with unread tokens, in the order of their coming
        self._token_bytes = 0  # of one token's keys and values; 0 until some are there

    @property
    def vocabulary(self) -> int:
        return self._model.base.vocabulary

    def adapter(self, name: str | None) -> LoadedAdapter:
        return self._model.adapter(name)

    @torch.inference_mode()
    def start(self, adapter: LoadedAdapter, begun: Prompt | None, length: int) -> Prompt:
        if begun is None:
            return Prompt(adapter, row_alone(1))
        if length - begun.place.length > _READ_AGAIN:
            self._read_pending()
        read = min(length, begun.place.length)
        place = CachedRow(begun.place.cache, begun.place.slot, read)
        prompt = Prompt(adapter, place, begun.unread[: length - read], own=False)
        if prompt.unread:
            self._pending[prompt] = None
        return prompt

    @torch.inference_mode()
    def read(self, cache: Prompt, tokens: Sequence[int]) -> None:
        unread = sum(len(prompt.unread) for prompt in self._pending)
        if unread + len(tokens) > decoding.PREFILL_TOKENS:
            self._read_pending()
        cache.unread += tokens
        cache.make_room(cache.place.length + len(cache.unread) + 1)  # the token that the row joins with
        self._pending[cache] = None

    def join(self, cache: Prompt, request: GenerationRequest) -> None:
        spoken = spoken_of(request, self.vocabulary, self._model.base.device)
        self._rows.append(_Row(request, cache.adapter, request.prompt[-1], spoken, prompt=cache))

    @torch.inference_mode()
    def leave(self, index: int) -> None:
        place = self._rows[index].place
        self._rows[index] = self._rows[-1]
        self._rows.pop()
        if place is not None:
            self._shared.release(place)

    def begin(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> None:
        """New rows read their prompts in the pass of all rows."""

    @torch.inference_mode()
    def decode(self, numbers: Sequence[int], allowed: Mapping[int, BoolArray]) -> Chosen:
        with explained_memory():
            places = self._next_places()
            rows = [self._rows[place] for place in places]
            asked = [
                SampledRow(row.request, numbers[place], row.spoken) for place, row in zip(places, rows, strict=True)
            ]
            choices = choose(self._next_logits(rows), asked, of_places(allowed, places))
        for row, choice in zip(rows, choices, strict=True):
            row.newest = choice.token
            if row.spoken is not None:
                row.spoken.add(choice.token)
        return Chosen(places, choices)

    @torch.inference_mode()
    def copy(self, index: int) -> Prompt:
        row = self._rows[index]
        if row.prompt is not None:
            return row.prompt
        assert row.place is not None
        length = row.place.length
        return Prompt(row.adapter, row_alone(length, row.place.layers(), length))

    @torch.inference_mode()
    def size(self, cache: Prompt) -> CacheSize:
        kept = cache.place.cache
        if not self._token_bytes:
            self._read_pending()
            self._token_bytes = kept.bytes // kept.capacity
        return CacheSize(self._token_bytes * kept.capacity)

    def _next_places(self) -> list[int]:
        """The rows that get a token: on a CPU not all new ones, but those with the least to read."""
        new = [(len(row.prompt.unread) + 1, place) for place, row in enumerate(self._rows) if row.prompt is not None]
        late, tokens = set[int](), 0
        for unread, place in sorted(new):
            if tokens and tokens + unread > _READ_TOGETHER and self._model.base.device.type == "cpu":
                late.add(place)
            tokens += unread
        return [place for place in range(len(self._rows)) if place not in late]

    def _next_logits(self, rows: Sequence[_Row]) -> Tensor:
        """[R, V] for some rows, from a pass that reads their newest tokens, and what is unread of prompts."""
        step, last = _Pass(), dict[_Row, int]()
        self._add_settled(step, last)
        new = [(row, row.prompt) for row in rows if row.prompt is not None]
        for row, prompt in new:
            last[row] = step.add_chunk(prompt, [*prompt.unread, row.newest])
            self._pending.pop(prompt, None)
            prompt.unread = []
        late = {row.prompt for row in self._rows if row.prompt is not None and row not in last}
        self._add_pending(step, [prompt for prompt in self._pending if prompt not in late])
        hidden = self._run(step)
        for row, prompt in new:
            row.place, row.prompt = self._shared.insert(prompt.place), None
        return self._model.base.split.logits(hidden[[last[row] for row in rows]])

    def _add_settled(self, step: _Pass, last: dict[_Row, int]) -> None:
        """The newest tokens of the rows in the shared caches, by cache and slot."""
        settled = {}
        for row in self._rows:
            if row.place is not None:
                row.place = self._shared.with_room(row.place)
                settled[row.place] = row
        for cache in self._shared:
            for place in cache.rows:
                last[settled[place]] = step.add_newest(settled[place], place.length)
            step.parts.append(NewestTokens(cache, self._model.base.device))

    def _add_pending(self, step: _Pass, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            step.add_chunk(prompt, prompt.unread)
            prompt.unread = []
            del self._pending[prompt]

    def _read_pending(self) -> None:
        """Read what is unread of prompts, without the rows."""
        if self._pending:
            with explained_memory():
                step = _Pass()
                self._add_pending(step, list(self._pending))
                self._run(step)

    def _run(self, step: _Pass) -> Tensor:
        """Hidden states [N, D] of a pass; keys and values are in the caches afterwards."""
        base = self._model.base
        tokens, positions = (torch.tensor([values], device=base.device) for values in (step.tokens, step.positions))
        with self._model.using(step.adapters):
            hidden = base.split.hidden(
                input_ids=tokens, position_ids=positions, rows=RaggedRows(step.parts), use_cache=False
            )
        for part in step.parts:
            part.advance()
        return hidden[0]

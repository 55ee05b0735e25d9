"""What decoding is in every engine: which requests make sense, what is remembered of one, and when it ends."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from finetune.core.errors import UsageError
from finetune.core.types import BoolArray, GenerationRequest, RequestId, TokenEvent

PREFILL_TOKENS = 512  # of a prompt that go through the model together


class Decoding(Protocol):
    """What an engine keeps of one request under way."""

    request: GenerationRequest
    produced: int  # tokens handed out


State = TypeVar("State", bound=Decoding)
Value = TypeVar("Value")


def check_request(request: GenerationRequest, vocabulary: int) -> None:
    """Refuse what no model can decode, with a UsageError."""
    if not request.prompt:
        raise UsageError("The prompt has no tokens. Give at least one.")
    biased = [token for token, _ in request.sampling.logit_bias]
    for name, tokens in (("The prompt", request.prompt), ("logit_bias", biased)):
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise UsageError(
                f"{name} has token {unknown[0]}, and the model knows 0 to {vocabulary - 1}. Use its own tokenizer."
            )
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens = {request.max_tokens}: ask for at least one token.")


def adapter_called(name: str | None, loaded: Mapping[str, Mapping[str, Value]]) -> Mapping[str, Value]:
    """The named adapter's weights by module; none for the base. Raises UsageError for a name that is not loaded."""
    if name is None:
        return {}
    if name not in loaded:
        raise UsageError(f"No adapter is called {name!r}. Loaded adapters: {', '.join(loaded) or 'none'}.")
    return loaded[name]


def require_free_name(name: str, loaded: Collection[str]) -> None:
    """Raises UsageError where an adapter of this name is loaded."""
    if name in loaded:
        raise UsageError(f"An adapter is called {name!r} already. Unload it first, or choose another name.")


def seen_tokens(request: GenerationRequest, vocabulary: int) -> BoolArray | None:
    """[V], True for the prompt's tokens; None where no repetition penalty asks for it."""
    if request.sampling.repetition_penalty == 1.0:
        return None
    seen = np.zeros(vocabulary, np.bool_)
    seen[list(request.prompt)] = True
    return seen


@dataclass(slots=True)
class ActiveRequests(Generic[State]):
    """The requests under way, in the order in which they were added."""

    _active: dict[RequestId, State] = field(default_factory=dict)
    _next_id: RequestId = 0

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, state: State) -> RequestId:
        """A new number for a request."""
        identifier = self._next_id
        self._next_id += 1
        self._active[identifier] = state
        return identifier

    def cancel(self, identifier: RequestId) -> None:
        """Forget a request, if it is still under way."""
        self._active.pop(identifier, None)

    def __iter__(self) -> Iterator[tuple[RequestId, State]]:
        return iter(list(self._active.items()))

    def produced(self, identifier: RequestId, token: int, logprob: float) -> TokenEvent:
        """The event of a request's next token; a request that it ends is forgotten."""
        state = self._active[identifier]
        state.produced += 1
        if token in state.request.stop_tokens:
            self.cancel(identifier)
            return TokenEvent(identifier, None, logprob, "stop")
        if state.produced == state.request.max_tokens:
            self.cancel(identifier)
            return TokenEvent(identifier, token, logprob, "length")
        return TokenEvent(identifier, token, logprob)

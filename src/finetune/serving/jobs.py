"""One answer under way: what the engine is asked for, and the text that its tokens have become."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from finetune.core.types import FinishReason, GenerationRequest, TokenEvent
from finetune.generation.text import Decoder, StopStrings, TextStream
from finetune.serving.errors import ApiError


@dataclass(frozen=True, slots=True)
class Token:
    """A decoded token: nats under the unmodified distribution, and where its text starts in the answer."""

    id: int
    logprob: float
    start: int
    alternatives: tuple[tuple[int, float], ...] = ()  # the likeliest tokens at its place, best first


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer with the tokens that it comes from. The last one has a reason or an error."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: ApiError | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


class AnswerText:
    """Tokens in, pieces out: whole characters, nothing from a stop string on, each token with its text."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._characters = TextStream(decoder, prompt)
        self._stops = StopStrings(stops)
        self._decoded = 0  # characters that all tokens together have made
        self._given = 0  # of these, the characters that went out
        self._pending: list[Token] = []  # tokens whose text has not gone out

    def take(self, event: TokenEvent) -> Piece:
        """What an event adds; `finish_reason` is set where the event or a stop string ends the answer."""
        text = ""
        if event.token is not None:
            self._pending.append(Token(event.token, event.logprob, self._decoded, event.top))
            text = self._through(self._characters.add(event.token))
        if self._stops.found:
            return self._piece(text, "stop")
        if event.finish_reason is not None:
            text += self._through(self._characters.finish())
            text += "" if self._stops.found else self._stops.finish()
            return self._piece(text, "stop" if self._stops.found else event.finish_reason)
        return self._piece(text, None)

    def _through(self, characters: str) -> str:
        self._decoded += len(characters)
        return self._stops.add(characters)

    def _piece(self, text: str, reason: FinishReason | None) -> Piece:
        self._given += len(text)
        everything = reason is not None and not self._stops.found
        ready = [token for token in self._pending if everything or token.start < self._given]
        self._pending = self._pending[len(ready) :]
        return Piece(text, tuple(ready), reason)


@dataclass(eq=False, slots=True)
class Job:
    """A request to the worker. Pieces come back through `deliver`, on the thread of the event loop."""

    request: GenerationRequest
    text: AnswerText
    whole: bool  # deliver the answer at once when it is done, instead of piece by piece
    deliver: Callable[[Piece], None]
    tokens: int = 0  # decoded so far
    first_token_at: float = 0.0  # on the monotonic clock
    gathered: list[Piece] = field(default_factory=list)

    def take(self, event: TokenEvent) -> Piece | None:
        """The piece to hand out now, if any."""
        if self.first_token_at == 0.0:
            self.first_token_at = time.monotonic()
        self.tokens += event.token is not None
        piece = self.text.take(event)
        if self.whole:
            self.gathered.append(piece)
            return joined(self.gathered) if piece.is_last else None
        return piece if piece.text or piece.tokens or piece.is_last else None


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece("".join(piece.text for piece in pieces), tokens, pieces[-1].finish_reason, pieces[-1].error)

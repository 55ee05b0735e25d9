"""One answer as it grows: tokens in, text out that never changes afterwards, with the reason for which it ends.

A terminal, an evaluation and a server show answers through this object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.core.types import FinishReason, TokenEvent
from finetune.generation.text import Decoder, StopStrings, TextStream


@dataclass(frozen=True, slots=True)
class Token:
    """A decoded token: nats under the unmodified distribution, and where its text starts in the answer."""

    id: int
    logprob: float
    start: int
    alternatives: tuple[tuple[int, float], ...] = ()  # the likeliest tokens at its place, best first


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, with the tokens whose text begins in it. The last piece has a reason."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None


class AnswerText:
    """Tokens in, pieces out: whole characters, and nothing from a stop string on."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._characters = TextStream(decoder, prompt)
        self._stops = StopStrings(stops)
        self._decoded = 0  # characters that all tokens together have made
        self._given = 0  # of these, the characters that went out
        self._pending: list[Token] = []  # tokens whose text has not gone out

    def take(self, event: TokenEvent) -> Piece:
        """What an event adds. `finish_reason` is set where the event or a stop string ends the answer.

        An answer that a stop string ends is to be cancelled in the generator, which knows tokens only.
        """
        text = ""
        if event.token is not None:
            self._pending.append(Token(event.token, event.logprob, self._decoded, event.top))
            text = self._through(self._characters.add(event.token))
        if self._stops.found:
            return self._piece(text, "stop")
        if event.finish_reason is None:
            return self._piece(text, None)
        text += self._through(self._characters.finish())
        text += "" if self._stops.found else self._stops.finish()
        return self._piece(text, "stop" if self._stops.found else event.finish_reason)

    def _through(self, characters: str) -> str:
        self._decoded += len(characters)
        return self._stops.add(characters)

    def _piece(self, text: str, reason: FinishReason | None) -> Piece:
        self._given += len(text)
        everything = reason is not None and not self._stops.found
        ready = [token for token in self._pending if everything or token.start < self._given]
        self._pending = self._pending[len(ready) :]
        return Piece(text, tuple(ready), reason)

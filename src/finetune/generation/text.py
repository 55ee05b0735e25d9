"""From tokens to text as they come: whole characters only, and never past a stop string."""

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens that stay in front of new ones: a decoder may treat the first token of a text in its own way.
CONTEXT_TOKENS = 16
# Tokens without the end of a character after which they are no text: a character has 4 bytes, a token at least one.
STUCK_TOKENS = 8


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of these ids; bytes that are no character become U+FFFD."""
        ...


class TextStream:
    """Text of one answer, token by token: what has been given out never changes afterwards.

    Tokens are decoded behind the prompt, because a SentencePiece decoder drops the space of the first token
    that it sees. A character whose bytes are spread over tokens is held back until it is whole, or until so many
    came that they are no character. To keep the cost of a token constant, decoding starts again from a place
    between two characters.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int]) -> None:
        self._decoder = decoder
        self._window = list(prompt)
        self._shown = len(decoder.decode(self._window))
        self._boundary = len(self._window)  # tokens before it end with a whole character
        self._held = 0  # tokens since the last whole character

    def add(self, token: int) -> str:
        """The text that this token completes; often a word, "" inside a character."""
        self._window.append(token)
        text = self._decoder.decode(self._window)
        ready = len(text.rstrip(UNFINISHED))
        self._held = 0 if ready == len(text) else self._held + 1
        if self._held == STUCK_TOKENS:
            ready, self._held = len(text), 0
        piece = text[self._shown : ready]
        self._shown = max(self._shown, ready)
        if ready == len(text) and len(self._window) - self._boundary >= CONTEXT_TOKENS:
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._shown = len(self._decoder.decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back: characters that never became whole."""
        return self._decoder.decode(self._window)[self._shown :]


class StopStrings:
    """Lets text through up to the first stop string, which may begin in one piece and end in a later one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that can no longer be part of a stop string."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        self._held = text[len(text) - self._beginning(text) :]
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """What was held back, as no stop string came."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        lengths = range(min(len(text), max((len(stop) for stop in self._stops), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)

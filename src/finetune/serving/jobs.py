"""One answer under way: what the engine is asked for, and what its tokens have become."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from finetune.core.types import GenerationRequest, TokenEvent
from finetune.generation.answers import AnswerText, Piece
from finetune.serving.errors import ApiError


@dataclass(eq=False, slots=True)
class Job:
    """A request to the worker. Pieces, or the error that ends it, come through `deliver` on the event loop's thread."""

    request: GenerationRequest
    text: AnswerText
    whole: bool  # deliver the answer at once when it is done, instead of piece by piece
    deliver: Callable[[Piece | ApiError], None]
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
            return joined(self.gathered) if piece.finish_reason is not None else None
        return piece if piece.text or piece.tokens or piece.finish_reason is not None else None


def joined(pieces: Sequence[Piece]) -> Piece:
    """Several pieces as one."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece("".join(piece.text for piece in pieces), tokens, pieces[-1].finish_reason)

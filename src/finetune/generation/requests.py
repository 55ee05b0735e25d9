"""Text in, text out: prompts become requests, a generator's tokens become answers.

One prompt on a terminal, the samples of an evaluation and a chat all go through `stream`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from finetune.core.errors import UsageError
from finetune.core.types import FinishReason, GenerationRequest, RequestId, Sampling, TokenEvent
from finetune.engines.base import Generator
from finetune.generation.answers import AnswerText
from finetune.generation.text import Decoder

# Requests that a generator is given at once: more than it decodes together, so that another waits when one ends.
TOGETHER = 64


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How an answer is decoded and where it ends."""

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # strings; the answer ends before the first of them


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads, and what ends its answer: tokens, and text that is no token of its own."""

    text: str
    ids: tuple[int, ...]
    stop_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt with its own options, answered by the base (None) or by an adapter."""

    prompt: Prompt
    options: AnswerOptions = field(default_factory=AnswerOptions)
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `tokens` are the decoded ids, of which a stop string may have cut the last from `text`."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Some text of request number `index`; `answer` comes with the last piece."""

    index: int
    text: str
    answer: Answer | None = None


def check_options(options: AnswerOptions) -> None:
    """Refuse values out of range, and values that greedy decoding would ignore: all of them at once."""
    sampling = options.sampling
    greedy = sampling.temperature == 0
    problems = [
        (options.max_tokens < 1, f"--max-tokens {options.max_tokens}: give at least 1"),
        (
            not 0 <= sampling.temperature < float("inf"),
            f"--temperature {sampling.temperature}: give 0 (greedy) or more",
        ),
        (not 0 < sampling.top_p <= 1, f"--top-p {sampling.top_p}: give more than 0, at most 1 (no limit)"),
        (sampling.top_k < 0, f"--top-k {sampling.top_k}: give 0 (no limit) or more"),
        (not 0 <= sampling.min_p < 1, f"--min-p {sampling.min_p}: give 0 (no limit) or more, below 1"),
        (not sampling.repetition_penalty > 0, f"--repetition-penalty {sampling.repetition_penalty}: give more than 0"),
        (not 0 <= sampling.seed < 2**32, f"--seed {sampling.seed}: give 0 to {2**32 - 1}"),
        ("" in options.stop, "--stop is empty: give the text that ends an answer"),
    ]
    limits = {"--top-p": sampling.top_p < 1, "--top-k": sampling.top_k > 0, "--min-p": sampling.min_p > 0}
    idle = [name for name, limited in limits.items() if limited] if greedy else []
    problems.append((bool(idle), f"{', '.join(idle)} would do nothing at temperature 0: give --temperature too"))
    wrong = [text for found, text in problems if found]
    if wrong:
        raise UsageError("\n".join(["These options cannot be used:", *(f"  {text}" for text in wrong)]))


def fit_to_context(request: TextRequest, context_length: int | None) -> TextRequest:
    """The request with `max_tokens` lowered to the room that the context leaves.

    Raises UsageError where the prompt leaves no room at all.
    """
    if context_length is None:
        return request
    length = len(request.prompt.ids)
    if length >= context_length:
        raise UsageError(
            f"The prompt has {length:,} tokens and the model's context is {context_length:,}, which must also hold "
            "the answer. Shorten the prompt, or choose a model with a longer context."
        )
    room = min(request.options.max_tokens, context_length - length)
    return replace(request, options=replace(request.options, max_tokens=room))


def stream(generator: Generator, requests: Sequence[TextRequest], decoder: Decoder) -> Iterator[TextPiece]:
    """Pieces of all answers as they come. Every request ends with exactly one piece that carries its answer.

    Leaving the iterator early cancels what is still being decoded.
    """
    waiting = iter(enumerate(requests))
    active: dict[RequestId, _Decoding] = {}
    try:
        while True:
            for index, request in islice(waiting, TOGETHER - len(active)):
                active[generator.add(_engine_request(request))] = _Decoding(index, request, decoder)
            if not active:
                return
            for event in generator.step():
                decoding = active.get(event.request)
                if decoding is None:
                    continue
                piece = decoding.take(event)
                if piece.answer is not None:
                    del active[event.request]
                    if event.finish_reason is None:
                        generator.cancel(event.request)
                if piece.text or piece.answer is not None:
                    yield piece
    finally:
        for request_id in active:
            generator.cancel(request_id)


def answer_all(generator: Generator, requests: Sequence[TextRequest], decoder: Decoder) -> list[Answer]:
    """The answers, in the order of the requests."""
    answers = {piece.index: piece.answer for piece in stream(generator, requests, decoder) if piece.answer}
    return [answers[index] for index in range(len(requests))]


def in_order(pieces: Iterator[TextPiece]) -> Iterator[TextPiece]:
    """The same pieces, those of each request only when all requests before it are answered."""
    held: dict[int, list[TextPiece]] = {}
    current = 0
    for piece in pieces:
        held.setdefault(piece.index, []).append(piece)
        while current in held:
            ready = held.pop(current)
            yield from ready
            if ready[-1].answer is None:
                break
            current += 1


def _engine_request(request: TextRequest) -> GenerationRequest:
    return GenerationRequest(
        prompt=request.prompt.ids,
        max_tokens=request.options.max_tokens,
        sampling=request.options.sampling,
        stop_tokens=request.prompt.stop_tokens,
        adapter=request.adapter,
    )


class _Decoding:
    """One request under way: its tokens, and the text that they have become."""

    def __init__(self, index: int, request: TextRequest, decoder: Decoder) -> None:
        self._index = index
        self._stream = AnswerText(decoder, request.prompt.ids, (*request.options.stop, *request.prompt.stop_strings))
        self._tokens: list[int] = []
        self._text = ""

    def take(self, event: TokenEvent) -> TextPiece:
        """The piece that an event makes; its answer is set where a stop string or the event ends the request."""
        piece = self._stream.take(event)
        self._tokens += [] if event.token is None else [event.token]
        self._text += piece.text
        reason = piece.finish_reason
        answer = Answer(self._text, tuple(self._tokens), reason) if reason else None
        return TextPiece(self._index, piece.text, answer)

"""Pieces of answers in OpenAI's documents, whole or as the chunks of a stream."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune.generation.answers import Piece
from finetune.serving.calls import Call
from finetune.serving.logprobs import chat_logprobs, text_logprobs
from finetune.serving.tools import ToolReader, called
from finetune.serving.vocabulary import Vocabulary


class AnswerShape(Protocol):
    """How one endpoint writes answers."""

    prefix: str  # of the answer's id
    kind: str  # `object` of a whole document
    chunk_kind: str  # and of a part of a stream

    def whole(self, index: int, answer: Piece) -> dict[str, Any]:
        """`choices[index]` of a whole document."""
        ...

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunks in front of a stream's text."""
        ...

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the chunks that a piece becomes."""
        ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """What stands around the choices."""

    model: str
    id: str
    shape: AnswerShape
    prompt_tokens: int
    count: int  # answers
    fingerprint: str  # what computes it
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """The fields in front of `choices`."""
        fields = {"id": self.id, "object": kind, "created": self.created}
        return {**fields, "model": self.model, "system_fingerprint": self.fingerprint}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Counts of the whole request."""
        total = self.prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
        }

    async def whole(self, call: Call) -> dict[str, Any]:
        """One document with all answers."""
        answers = await call.answers()
        listed = [self.shape.whole(index, answer) for index, answer in enumerate(answers)]
        return {**self.head(self.shape.kind), "choices": listed, "usage": self.usage(call.completion_tokens)}

    async def chunks(self, call: Call, *, include_usage: bool) -> AsyncIterator[dict[str, Any] | None]:
        """The documents of a stream, None for silence; with `include_usage` the last one says what it took."""
        head = self.head(self.shape.chunk_kind)
        end: dict[str, Any] = {"usage": None} if include_usage else {}
        for index in range(self.count):
            for choice in self.shape.opening(index):
                yield {**head, "choices": [choice], **end}
        async for found in call.pieces():
            if found is None:
                yield None
                continue
            for choice in self.shape.chunks(*found):
                yield {**head, "choices": [choice], **end}
        if include_usage:
            yield {**head, "choices": [], "usage": self.usage(call.completion_tokens)}


class ChatShape:
    """Answers of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary | None, new_reader: Callable[[], ToolReader] | None = None) -> None:
        self._vocabulary = vocabulary  # None: no log-probabilities are asked for
        self._new_reader = new_reader
        self._readers: dict[int, ToolReader] = {}

    def whole(self, index: int, answer: Piece) -> dict[str, Any]:
        """See AnswerShape."""
        text, calls = self._divided(index, answer)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        reason = _reason(answer, calls)
        return {"index": index, "message": message, "logprobs": self._logprobs(answer), "finish_reason": reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """See AnswerShape."""
        return [_delta(index, {"role": "assistant"})]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """See AnswerShape."""
        text, calls = self._divided(index, piece)
        made = []
        if text or (piece.tokens and self._vocabulary):
            made.append(_delta(index, {"content": text}, self._logprobs(piece)))
        for number, call in enumerate(calls):
            made.append(_delta(index, {"tool_calls": [{"index": number, **call}]}))
        if piece.finish_reason is not None:
            made.append(_delta(index, {}, reason=_reason(piece, calls)))
        return made

    def _divided(self, index: int, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """Text and calls; calls are known with the last piece."""
        if self._new_reader is None:
            return piece.text, []
        if index not in self._readers:
            self._readers[index] = self._new_reader()
        reader = self._readers[index]
        text = reader.add(piece.text)
        if piece.finish_reason is None:
            return text, []
        rest, calls = reader.finish()
        return text + rest, called(calls)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return None if self._vocabulary is None else chat_logprobs(piece.tokens, self._vocabulary)


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _reason(piece: Piece, calls: Sequence[Any]) -> str | None:
    return "tool_calls" if calls and piece.finish_reason == "stop" else piece.finish_reason


class TextShape:
    """Answers of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, vocabulary: Vocabulary | None, top: int) -> None:
        self._vocabulary = vocabulary
        self._top = top

    def whole(self, index: int, answer: Piece) -> dict[str, Any]:
        """See AnswerShape."""
        return self._choice(index, answer, answer.finish_reason)

    def opening(self, index: int) -> list[dict[str, Any]]:
        """See AnswerShape: there is no role to name."""
        return []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """See AnswerShape."""
        made = [self._choice(index, piece, None)] if piece.text or piece.tokens else []
        if piece.finish_reason is not None:
            made.append({"index": index, "text": "", "logprobs": None, "finish_reason": piece.finish_reason})
        return made

    def _choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        logprobs = None if self._vocabulary is None else text_logprobs(piece.tokens, self._vocabulary, top=self._top)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}

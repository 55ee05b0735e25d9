"""Decoding: a key-value cache for each request, one token a request and step, one synchronisation a step.

While a token is handed out, the next one is already under way: the device is fed its own output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from finetune.core.errors import UsageError
from finetune.core.types import GenerationRequest, RequestId, TokenEvent
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.sampling import sample

PREFILL_TOKENS = 512  # of a prompt that go through the model together


@dataclass(slots=True)
class _Decoding:
    """One request under way. `pending` is its next (token, log-probability), being computed."""

    request: GenerationRequest
    cache: list[Any]
    seen: Any | None  # bool [V], only for a repetition penalty
    pending: tuple[Any, Any] | None = None
    produced: int = 0
    scheduled: int = 0


@dataclass(slots=True)
class MLXGenerator:
    """Implements `Generator`. `select` puts an adapter (None: what is being trained, or the base) into the model."""

    base: BaseModel
    select: Callable[[str | None], None]
    _active: dict[RequestId, _Decoding] = field(default_factory=dict)
    _next_id: RequestId = 0

    def add(self, request: GenerationRequest) -> RequestId:
        if not request.prompt:
            raise UsageError("The prompt has no tokens. Give at least one.")
        if request.max_tokens < 1:
            raise UsageError(f"max_tokens = {request.max_tokens}: ask for at least one token.")
        self.select(request.adapter)  # an unknown name is refused here, not in the middle of decoding
        identifier = self._next_id
        self._next_id += 1
        self._active[identifier] = _Decoding(request, compat.new_cache(self.base.model), self._seen(request))
        return identifier

    def cancel(self, request: RequestId) -> None:
        self._active.pop(request, None)

    def step(self) -> Sequence[TokenEvent]:
        with explained_memory():
            for decoding in self._active.values():
                if decoding.pending is None:
                    self.select(decoding.request.adapter)
                    self._prefill(decoding)
            ready = [(identifier, decoding, decoding.pending) for identifier, decoding in self._active.items()]
            for _, decoding, _ in ready:
                if decoding.scheduled < decoding.request.max_tokens:
                    self.select(decoding.request.adapter)
                    self._advance(decoding)
            following = [part for _, decoding, _ in ready for part in decoding.pending or ()]
            mx.async_eval(*following)  # type: ignore[no-untyped-call]
            return [self._event(identifier, decoding, pending) for identifier, decoding, pending in ready if pending]

    def _seen(self, request: GenerationRequest) -> Any | None:
        if request.sampling.repetition_penalty == 1.0:
            return None
        seen = np.zeros(self.base.vocabulary, np.bool_)
        seen[list(request.prompt)] = True
        return mx.array(seen)

    def _prefill(self, decoding: _Decoding) -> None:
        tokens = mx.array(decoding.request.prompt, mx.int32)
        hidden = None
        for start in range(0, tokens.size, PREFILL_TOKENS):
            hidden = self.base.split.body(tokens[None, start : start + PREFILL_TOKENS], cache=decoding.cache)
            if start + PREFILL_TOKENS < tokens.size:
                mx.eval([part.state for part in decoding.cache])  # so that one chunk is in memory at a time
        self._choose(decoding, hidden)

    def _advance(self, decoding: _Decoding) -> None:
        if decoding.pending is not None:
            token, _ = decoding.pending
            self._choose(decoding, self.base.split.body(token.reshape(1, 1), cache=decoding.cache))

    def _choose(self, decoding: _Decoding, hidden: Any) -> None:
        logits = self.base.split.logits(hidden[:, -1])[0]
        sampling = decoding.request.sampling
        decoding.pending = sample(logits, sampling, number=decoding.scheduled, seen=decoding.seen)
        decoding.scheduled += 1
        if decoding.seen is not None:
            decoding.seen = mx.put_along_axis(decoding.seen, decoding.pending[0].reshape(1), mx.array([True]), axis=-1)

    def _event(self, identifier: RequestId, decoding: _Decoding, pending: tuple[Any, Any]) -> TokenEvent:
        token, logprob = int(pending[0].item()), float(pending[1].item())
        decoding.produced += 1
        if token in decoding.request.stop_tokens:
            del self._active[identifier]
            return TokenEvent(identifier, None, logprob, "stop")
        if decoding.produced == decoding.request.max_tokens:
            del self._active[identifier]
            return TokenEvent(identifier, token, logprob, "length")
        return TokenEvent(identifier, token, logprob)

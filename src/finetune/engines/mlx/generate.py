"""Decoding: a key-value cache for each request, one token a request and step, one synchronisation a step.

While a token is handed out, the next one is already under way: the device is fed its own output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from finetune.core.types import GenerationRequest, RequestId, TokenEvent
from finetune.engines import decoding
from finetune.engines.decoding import ActiveRequests
from finetune.engines.mlx import compat
from finetune.engines.mlx.device import explained_memory
from finetune.engines.mlx.loading import BaseModel
from finetune.engines.mlx.sampling import sample


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
    _requests: ActiveRequests[_Decoding] = field(default_factory=ActiveRequests)

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def add(self, request: GenerationRequest) -> RequestId:
        decoding.check_request(request, self.base.vocabulary)
        self.select(request.adapter)  # an unknown name is refused here, not in the middle of decoding
        seen = decoding.seen_tokens(request, self.base.vocabulary)
        on_device = None if seen is None else mx.array(seen)
        return self._requests.add(_Decoding(request, compat.new_cache(self.base.model), on_device))

    def cancel(self, request: RequestId) -> None:
        self._requests.cancel(request)

    def step(self) -> Sequence[TokenEvent]:
        with explained_memory():
            active = list(self._requests)
            for _, state in active:
                if state.pending is None:
                    self.select(state.request.adapter)
                    self._prefill(state)
            ready = [(identifier, state.pending) for identifier, state in active if state.pending]
            for _, state in active:
                if state.scheduled < state.request.max_tokens:
                    self.select(state.request.adapter)
                    self._advance(state)
            mx.async_eval([state.pending for _, state in active])  # type: ignore[no-untyped-call]
            return [
                self._requests.produced(identifier, int(token.item()), float(logprob.item()))
                for identifier, (token, logprob) in ready
            ]

    def _prefill(self, state: _Decoding) -> None:
        tokens = mx.array(state.request.prompt, mx.int32)
        hidden = None
        for start in range(0, tokens.size, decoding.PREFILL_TOKENS):
            hidden = self.base.split.body(tokens[None, start : start + decoding.PREFILL_TOKENS], cache=state.cache)
            if start + decoding.PREFILL_TOKENS < tokens.size:
                mx.eval([part.state for part in state.cache])  # so that one chunk is in memory at a time
        self._choose(state, hidden)

    def _advance(self, state: _Decoding) -> None:
        if state.pending is not None:
            token, _ = state.pending
            self._choose(state, self.base.split.body(token.reshape(1, 1), cache=state.cache))

    def _choose(self, state: _Decoding, hidden: Any) -> None:
        logits = self.base.split.logits(hidden[:, -1])[0]
        sampling = state.request.sampling
        state.pending = sample(logits, sampling, number=state.scheduled, seen=state.seen)
        state.scheduled += 1
        if state.seen is not None:
            state.seen = mx.put_along_axis(state.seen, state.pending[0].reshape(1), mx.array([True]), axis=-1)

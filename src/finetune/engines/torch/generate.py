"""Decoding: a key-value cache for each request, one token a request and step, one synchronisation a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finetune.core.types import GenerationRequest, RequestId, TokenEvent
from finetune.engines import decoding
from finetune.engines.decoding import ActiveRequests
from finetune.engines.torch import compat
from finetune.engines.torch.device import explained_memory
from finetune.engines.torch.loading import BaseModel
from finetune.engines.torch.sampling import sample


@dataclass(slots=True)
class _Decoding:
    """One request under way."""

    request: GenerationRequest
    cache: Any
    seen: Tensor | None  # bool [V], only for a repetition penalty
    last: Tensor | None = None  # the newest token, which the model has not read
    produced: int = 0


@dataclass(slots=True)
class TorchGenerator:
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
        on_device = None if seen is None else torch.from_numpy(seen).to(self.base.device)
        return self._requests.add(_Decoding(request, compat.new_cache(self.base.model), on_device))

    def cancel(self, request: RequestId) -> None:
        self._requests.cancel(request)

    @torch.inference_mode()
    def step(self) -> Sequence[TokenEvent]:
        with explained_memory():
            active = list(self._requests)
            chosen = [self._next(state) for _, state in active]
            if not chosen:
                return []
            tokens = torch.stack([token for token, _ in chosen]).tolist()
            logprobs = torch.stack([logprob for _, logprob in chosen]).tolist()
        results = zip(active, tokens, logprobs, strict=True)
        return [self._requests.produced(identifier, token, logprob) for (identifier, _), token, logprob in results]

    def _next(self, state: _Decoding) -> tuple[Tensor, Tensor]:
        """The request's next token and its log-probability."""
        self.select(state.request.adapter)
        hidden = self._prefill(state) if state.last is None else self._read(state, state.last.view(1, 1))
        logits = self.base.split.logits(hidden[0, -1])
        token, logprob = sample(logits, state.request.sampling, number=state.produced, seen=state.seen)
        state.last = token
        if state.seen is not None:
            state.seen[token] = True
        return token, logprob

    def _prefill(self, state: _Decoding) -> Tensor:
        tokens = torch.tensor([state.request.prompt], device=self.base.device)
        parts = [self._read(state, part)[:, -1:] for part in torch.split(tokens, decoding.PREFILL_TOKENS, 1)]
        return parts[-1]

    def _read(self, state: _Decoding, tokens: Tensor) -> Tensor:
        return self.base.split.hidden(input_ids=tokens, past_key_values=state.cache, use_cache=True)

"""A model small enough to check by hand: the next token depends on the last one alone (a bigram table)."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from finetune.core.types import (
    Batch,
    FloatArray,
    GenerationRequest,
    LossSum,
    ParameterCount,
    RequestId,
    TokenEvent,
)

VOCABULARY = 261  # as many as tests.support.tiny_tokenizer has
BOS, EOS, PAD = 256, 257, 258


class ByteTokenizer:
    """Ids are the bytes of UTF-8, then BOS, EOS and padding."""

    bos_id: int | None = BOS
    eos_id: int | None = EOS
    pad_id = PAD
    vocab_size = VOCABULARY
    chat_template: str | None = None
    fingerprint = "bytes"

    def __init__(self, *, adds_bos: bool = True) -> None:
        self.adds_bos = adds_bos

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(list(text.encode()), dtype=np.int32)
        return ids, np.zeros((len(ids), 2), dtype=np.int32)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def chain(text: str, *, then: int = EOS) -> dict[int, int]:
    """Transitions that spell `text`, whose characters must differ, after BOS, and end with `then`."""
    ids = [BOS, *text.encode(), then]
    assert len(set(ids)) == len(ids), "a bigram model cannot repeat a byte"
    return dict(itertools.pairwise(ids))


def table(transitions: Mapping[int, int], *, confidence: float = 8.0) -> FloatArray:
    """Logits [V, V] that prefer the given next token; every other row is uniform."""
    logits = np.zeros((VOCABULARY, VOCABULARY), dtype=np.float32)
    for token, following in transitions.items():
        logits[token, following] = confidence
    return logits


class BigramSession:
    """InferenceSession over one table for the base and one for each adapter."""

    def __init__(self, base: FloatArray, adapters: Mapping[str, FloatArray] | None = None) -> None:
        self.tables: dict[str | None, FloatArray] = {None: base, **(adapters or {})}
        self.closed = False
        self.calls: list[tuple[str | None, int]] = []  # adapter and rows of each scored batch

    @property
    def parameters(self) -> ParameterCount:
        return ParameterCount(trainable=0, total=self.tables[None].size)

    def loss(self, batch: Batch, *, adapter: str | None = None) -> LossSum:
        self.calls.append((adapter, len(batch.inputs)))
        logprobs = self.token_logprobs(batch, adapter=adapter)
        guesses = self.tables[adapter][batch.inputs].argmax(-1)
        correct = int(((guesses == batch.targets) & batch.loss_mask).sum())
        return LossSum(float(-logprobs.sum(dtype=np.float64)), batch.trained_tokens, correct)

    def token_logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        logprobs = self._logprobs(batch, adapter)
        chosen = np.take_along_axis(logprobs, batch.targets[..., None].astype(np.int64), -1)[..., 0]
        return np.where(batch.loss_mask, chosen, np.float32(0))

    def logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        return self._logprobs(batch, adapter)[batch.loss_mask]

    def _logprobs(self, batch: Batch, adapter: str | None) -> FloatArray:
        logits = self.tables[adapter][batch.inputs]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def generator(self) -> "BigramGenerator":
        return BigramGenerator(self.tables)

    def close(self) -> None:
        self.closed = True


class BigramGenerator:
    """Generator that decodes all requests one token a step; `active_at_most` records how many ran together."""

    def __init__(self, tables: Mapping[str | None, FloatArray]) -> None:
        self._tables = tables
        self._active: dict[RequestId, tuple[GenerationRequest, list[int], np.random.Generator]] = {}
        self._next = 0
        self.active_at_most = 0
        self.cancelled: list[RequestId] = []
        self.seen: list[GenerationRequest] = []

    @property
    def busy(self) -> bool:
        return bool(self._active)

    def add(self, request: GenerationRequest) -> RequestId:
        self._next += 1
        self.seen.append(request)
        self._active[self._next] = (request, [], np.random.default_rng(request.sampling.seed))
        self.active_at_most = max(self.active_at_most, len(self._active))
        return self._next

    def cancel(self, request: RequestId) -> None:
        self.cancelled.append(request)
        self._active.pop(request, None)

    def step(self) -> Sequence[TokenEvent]:
        return [self._decode(request_id) for request_id in list(self._active)]

    def _decode(self, request_id: RequestId) -> TokenEvent:
        request, tokens, rng = self._active[request_id]
        logits = self._tables[request.adapter][(request.prompt + tuple(tokens))[-1]]
        token = int(logits.argmax())
        if request.sampling.temperature > 0:
            token = int((logits / request.sampling.temperature + rng.gumbel(size=logits.shape)).argmax())
        if token in request.stop_tokens:
            del self._active[request_id]
            return TokenEvent(request_id, None, 0.0, "stop")
        tokens.append(token)
        if len(tokens) == request.max_tokens:
            del self._active[request_id]
            return TokenEvent(request_id, token, 0.0, "length")
        return TokenEvent(request_id, token, 0.0)

"""The values that pass between the layers: batches, losses, steps, generation requests.

Everything here is NumPy and plain Python, so that no layer above the engines meets an engine's arrays.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float32]

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Targets are already shifted: engines do no index arithmetic."""

    inputs: IntArray  # [B, T]
    targets: IntArray  # [B, T]
    loss_mask: BoolArray  # [B, T]  True where the target is trained on
    positions: IntArray  # [B, T]  restart for each packed document
    segments: IntArray  # [B, T]  document number within the row, from 1; 0 is padding

    @property
    def tokens(self) -> int:
        """Real tokens: what the model reads, without padding."""
        return int(np.count_nonzero(self.segments))

    @property
    def documents(self) -> int:
        """Rows of the data set in it: packed rows hold several."""
        return int(self.segments.max(axis=1).sum())

    @property
    def trained_tokens(self) -> int:
        """Tokens whose loss counts."""
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss that can be added up over batches of any size without a change in its meaning."""

    total: float  # summed over trained tokens, nats
    tokens: int  # trained tokens
    correct: int  # trained tokens whose most probable prediction is the target

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.total + other.total, self.tokens + other.tokens, self.correct + other.correct)

    @property
    def mean(self) -> float:
        """Nats per trained token; NaN where nothing is trained on."""
        return self.total / self.tokens if self.tokens else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of trained tokens that are predicted exactly."""
        return self.correct / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    loss: float  # mean over the step's trained tokens, nats
    grad_norm: float  # global norm before clipping
    applied: bool  # False where loss or gradient was not finite: weights and optimizer are as before


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of scalar parameters; adapters count as part of the total."""

    trainable: int
    total: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy and ignores top_p, top_k, min_p and the seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # taken from the logits for each time that a token is in the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    seed: int = 0


class TokenConstraint(Protocol):
    """What an answer may be made of, for one request: a grammar, a schema, a list of words."""

    def allowed(self) -> BoolArray:
        """[V], True for each token that may come next: at least one, a stop token where the answer may end."""
        ...

    def advance(self, token: int) -> None:
        """The answer has grown by this token, one of the allowed ones."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue, with its own sampling, its own limits and the adapter that answers."""

    prompt: tuple[int, ...]  # token ids, BOS included where the model wants one
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()  # ending ids; never returned
    adapter: str | None = None  # the name of a loaded adapter; None is the base
    top_logprobs: int = 0  # most probable tokens that each event lists
    constraint: TokenConstraint | None = None


RequestId: TypeAlias = int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One decoded token of one request, or its end (`token` is None when it ended on a stop token).

    Log-probabilities are in nats, of the model's distribution before penalties, temperature and filters.
    """

    request: RequestId
    token: int | None
    logprob: float
    finish_reason: FinishReason | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability) of the most probable ones, best first


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote: number of merged modules and the largest change of a weight."""

    modules: int
    largest_change: float

"""The contract between the product and an engine. Nothing above this file knows MLX or PyTorch.

One optimizer step is one call. The learning rate is an argument, batches are NumPy, adapters have PEFT's names:
so data, schedules, checkpoints and metrics exist once. An engine declares what it can do in `features`; an
option that it lacks is refused before a model is loaded (`registry.require`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from finetune.adapters.lora import AdapterInit
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import (
    Batch,
    Dtype,
    FloatArray,
    GenerationRequest,
    LossSum,
    MergeReport,
    ParameterCount,
    RequestId,
    StepResult,
    TokenEvent,
)


class Feature(StrEnum):
    """Something an engine may be able to do."""

    LORA = "lora"
    DORA = "dora"
    FULL = "full"
    QUANTIZATION = "quantization"
    GRADIENT_CHECKPOINTING = "gradient_checkpointing"
    PACKING = "packing"


class PendingStep(Protocol):
    """A step under way on the device."""

    def result(self) -> StepResult:
        """Wait for the device. Call only when the numbers are needed."""
        ...


class Generator(Protocol):
    """Decodes any number of requests together. A single prompt, a test set and a server use the same object."""

    @property
    def busy(self) -> bool:
        """Whether a request waits or is under way: call `step` for as long as that is so."""
        ...

    def add(self, request: GenerationRequest) -> RequestId:
        """Queue a request; the first token comes with a later `step`."""
        ...

    def cancel(self, request: RequestId) -> None:
        """Forget a request; no further event mentions it."""
        ...

    def step(self) -> Sequence[TokenEvent]:
        """At most one token for each active request; empty where prompts were read, or a part of a step computed.

        Where it raises, all requests are lost, and another generator has to take its place.
        """
        ...


class TrainSession(Protocol):
    """A model with trainable weights and its optimizer, on one device."""

    @property
    def parameters(self) -> ParameterCount:
        """Trainable and total."""
        ...

    @property
    def notices(self) -> Sequence[str]:
        """What a person should know about how the model was loaded, one sentence each."""
        ...

    def step(self, micro_batches: Sequence[Batch], *, learning_rate: float) -> PendingStep:
        """Add up the gradients of all micro-batches, divide by all their trained tokens, clip, update.

        A step whose loss or gradient is not finite changes nothing (`StepResult.applied` is False), but
        still counts for the dropout stream, which depends on the seed and the number of calls alone.
        """
        ...

    def loss(self, batch: Batch) -> LossSum:
        """Loss without dropout or label smoothing; changes nothing."""
        ...

    def generator(self) -> Generator:
        """Decode with the weights as they are now."""
        ...

    def weights(self) -> Mapping[str, FloatArray]:
        """The trainable weights: PEFT names and shapes for adapters, the model's own names for full tuning."""
        ...

    def save_weights(self, directory: Path) -> None:
        """Write what was trained: PEFT files for adapters, a whole model directory for full tuning."""
        ...

    def save_state(self, directory: Path) -> None:
        """Write optimizer and RNG into `optimizer.safetensors` of an existing directory."""
        ...

    def load_state(self, directory: Path) -> None:
        """Take weights, optimizer and RNG back from what `save_weights` and `save_state` wrote, bit for bit."""
        ...

    def peak_memory_bytes(self) -> int:
        """The most memory that this process held for arrays since the session opened."""
        ...

    def close(self) -> None:
        """Free the device's memory. Further calls are errors."""
        ...


class InferenceSession(Protocol):
    """One base in memory, for scoring and decoding, with any number of adapters chosen per call."""

    @property
    def parameters(self) -> ParameterCount:
        """`trainable` counts the adapters' parameters."""
        ...

    def loss(self, batch: Batch, *, adapter: str | None = None) -> LossSum:
        """Loss of the base (None) or of the base with the named adapter."""
        ...

    def token_logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        """log p(target) in nats, [B, T]; 0 where `loss_mask` is False."""
        ...

    def logprobs(self, batch: Batch, *, adapter: str | None = None) -> FloatArray:
        """log p of every token of the vocabulary where `loss_mask` is True, in nats, [N, V]: for few positions."""
        ...

    def generator(self) -> Generator:
        """A decoder over the base and all adapters, also those that are loaded later."""
        ...

    def load_adapter(self, name: str, directory: Path) -> None:
        """Put another adapter beside the base; requests under way go on.

        Raises UsageError for a name that is taken, ModelError for files that do not fit; nothing changes then.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Requests under way with it end with its weights; new ones are refused."""
        ...

    def close(self) -> None:
        """Free the device's memory. Further calls are errors."""
        ...


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What `ft doctor` and `run.json` say about an engine on this machine."""

    name: str
    version: str
    device: str  # e.g. "cpu (OpenBLAS)", "Apple M3 Max (Metal)"
    details: Mapping[str, str]
    advice: tuple[str, ...] = ()  # what to install or change, one sentence each


class Engine(Protocol):
    """One way of running models. `model` arguments are directories that `finetune.models` has resolved."""

    name: str
    features: frozenset[Feature]
    packs_rows: bool  # whether rows lie end to end where `training.packing` does not say

    def info(self) -> EngineInfo:
        """Version and device; imports the engine's library."""
        ...

    def hardware_problems(self, model: ModelConfig) -> Sequence[str]:
        """Why `model.device` or `model.dtype` cannot be had on this machine, one sentence each, before any loading."""
        ...

    def compute_dtype(self, model: ModelConfig, stored: Dtype) -> Dtype:
        """The type that weights and products get where the files hold mostly `stored`."""
        ...

    def matmul_rate(self, dtype: Dtype) -> float:
        """FLOP/s of a matrix product of the size that training meets, measured now, in well under a second."""
        ...

    def graphs(self, model: ModelConfig, training: TrainingConfig) -> int:
        """How many parts of a step are computed side by side, each with activations of its own."""
        ...

    def free_memory(self, model: ModelConfig) -> int:
        """Bytes that arrays could still take where `model.device` computes."""
        ...

    def spare_memory(self) -> None:
        """Give freed memory back to the system at once from here on, where that costs speed and is not the habit."""
        ...

    def open_training(
        self,
        model: Path,
        *,
        model_config: ModelConfig,
        training: TrainingConfig,
        lora: LoraConfig,
        init: AdapterInit,
    ) -> TrainSession:
        """Load the base, add what is trained, make the optimizer.

        Raises ModelError with every mismatch of names and shapes at once, and ConfigError for a target that
        matches nothing (with the names that exist).
        """
        ...

    def open_inference(
        self, model: Path, *, model_config: ModelConfig, adapters: Mapping[str, Path]
    ) -> InferenceSession:
        """Load the base once, and each adapter (PEFT or mlx-lm files) beside it."""
        ...

    def module_paths(self, model: Path) -> Mapping[str, str]:
        """PEFT's name of each linear module of `model` -> its path in the engine's own library, for exports."""
        ...

    def merge(
        self, model: Path, *, model_config: ModelConfig, adapter: Path, destination: Path, dequantize: bool = False
    ) -> MergeReport:
        """Write base + adapter as one model directory, added in float32 and rounded once to the base's type.

        A base that `model_config` quantises on loading takes part as the quantised values that the adapter was
        trained on, and is written in the type of its files. A base whose files are quantised is quantised again
        like them, or with `dequantize` written in a floating point type.
        """
        ...


class Packer(Protocol):
    """Writes models in the few bits of MLX's own files."""

    def __call__(self, model: Path, *, bits: int, destination: Path) -> None:
        """Fill `destination` with the floating point model of a directory, packed as mlx-lm packs it."""
        ...

"""What the memory of a run depends on, and what an engine keeps of a step."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from finetune.engines.registry import EngineName

FLOAT32 = 4


class Reads(NamedTuple):
    """Whether some module is trained that reads a place of a layer: 1 or 0."""

    attention: int = 1  # queries, keys, values
    result: int = 1  # what follows attention
    feed_forward: int = 1  # gate, up
    product: int = 1  # what ends the feed-forward part


EVERYWHERE = Reads()


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What memory depends on, besides the model."""

    engine: EngineName
    method: Literal["lora", "dora", "full"]
    value_bytes: int  # of weights and activations: 4 for float32, 2 for 16 bits
    bits: int | None  # of the linear weights of a quantised base
    adapter_parameters: int  # 0 for full
    ranks: int  # of all adapted modules of a layer, added up
    moments: int  # float32 values that the optimizer keeps for each trained one
    tokens: int  # whose activations are in memory together
    longest: int  # tokens of the longest document
    trained: int  # tokens of `tokens` that are trained on
    reads: Reads = EVERYWHERE
    recompute: bool = False  # gradient checkpointing
    calls: int = 1  # micro-batches of a step, one after the other
    sizes: int = 1  # how many different numbers of tokens they have, in all steps
    graphs: int = 1  # parts of a step that are computed side by side
    on_cpu: bool = True
    returns_memory: bool = False  # `Engine.spare_memory`
    resident: int = 0  # bytes that the process holds before the model is loaded


class Kept(NamedTuple):
    """Values of each token, in the type of the products, at the two moments that need most."""

    inner: float  # kept by a layer for its backward pass, in arrays as wide as the feed-forward part
    narrow: float  # kept by a layer in other arrays
    passing: float  # that live while a layer's gradients are computed, beside what it kept

"""What a config.json says about the sizes of a model, before there are weights: modules, shapes, parameters.

Known are the decoders that this project proves (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi3, gpt2) and
others of the same plan: repeated layers of attention and a feed-forward part. Mixtures of experts and state-space
models are not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.models.info import quantization_of
from finetune.models.source import text_config

_TIED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2"})  # unless config.json says otherwise
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "ssm_cfg", "state_size")
_FOUR_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})
_QUERY_NORMS = frozenset({"qwen3", "gemma3", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module of every layer, by its name within the layer."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Of the matrix, without the bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a decoder. Widths are in values a token."""

    model_type: str
    layers: int
    width: int  # of the hidden states
    inner: int  # of the feed-forward part
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool  # whether the head is the embedding
    gated: bool  # whether the feed-forward part multiplies two of its three products
    positions: int  # rows of a learned embedding of positions
    linears: tuple[Linear, ...]  # of one layer
    layer_prefix: str  # the names of layer n begin with this, formatted
    soft_capped: bool = False  # whether scores of attention are kept within a cap by tanh
    capped_logits: bool = False  # whether logits are
    stored_bits: int | None = None  # of files that MLX has quantised, with their embeddings

    @property
    def norms(self) -> int:
        """Of a layer, without those of queries and keys: two before products, and in some models two after them."""
        return 4 if self.model_type in _FOUR_NORMS else 2

    @property
    def query_norms(self) -> bool:
        """Whether queries and keys are normed."""
        return self.model_type in _QUERY_NORMS

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their positions, and no position is learned."""
        return not self.positions

    @property
    def fused_attention(self) -> bool:
        """Whether one product gives queries, keys and values."""
        return self.linears[0].out_features > self.query_width

    @property
    def gelu(self) -> bool:
        """Whether the feed-forward part gates with GELU, in place of SiLU."""
        return self.model_type.startswith("gemma")

    @property
    def query_width(self) -> int:
        """Of the queries of all heads."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Of the keys of all heads; values are as wide."""
        return self.kv_heads * self.head_width

    @property
    def layer_weights(self) -> int:
        """Values of the matrices of one layer."""
        return sum(linear.weights for linear in self.linears)

    @property
    def linear_weights(self) -> int:
        """Values of the matrices of all layers: what is quantised, and what adapters stand beside."""
        return self.layers * self.layer_weights

    @property
    def other_parameters(self) -> int:
        """Embeddings, an untied head, biases and norms."""
        embeddings = (self.vocabulary * (1 if self.tied else 2) + self.positions) * self.width
        scales = 2 if self.model_type == "gpt2" else 1  # its norms have biases
        layer = self.norms * scales * self.width + sum(linear.out_features for linear in self.linears if linear.bias)
        layer += 2 * self.head_width * self.query_norms
        return embeddings + self.layers * layer + scales * self.width

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.linear_weights + self.other_parameters

    def modules(self) -> Iterator[tuple[str, Linear]]:
        """Every linear module of every layer by its full name."""
        for layer in range(self.layers):
            for linear in self.linears:
                yield self.layer_prefix.format(layer) + linear.name, linear


def read_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The sizes that config.json gives; None where it describes no decoder of this plan."""
    text = text_config(config)
    kind = str(text.get("model_type") or config.get("model_type"))
    if any(text.get(key) for key in _EXPERTS):
        return None
    width = _number(text, "hidden_size", "n_embd")
    layers = _number(text, "num_hidden_layers", "n_layer")
    heads = _number(text, "num_attention_heads", "n_head")
    vocabulary = _number(text, "vocab_size")
    if not (width and layers and heads and vocabulary):
        return None
    inner = _number(text, "intermediate_size", "n_inner") or (4 * width if kind == "gpt2" else None)
    if inner is None:
        return None
    kv_heads = _number(text, "num_key_value_heads") or heads
    head_width = _number(text, "head_dim") or width // heads
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return Architecture(
        model_type=kind,
        layers=layers,
        width=width,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        vocabulary=vocabulary,
        tied=kind in _TIED if tied is None else bool(tied),
        gated=kind != "gpt2",
        positions=(_number(text, "n_positions", "n_ctx") or 0) if kind == "gpt2" else 0,
        linears=_linears(kind, text, _Widths(width, inner, heads * head_width, kv_heads * head_width)),
        layer_prefix="transformer.h.{}." if kind == "gpt2" else "model.layers.{}.",
        soft_capped=bool(text.get("attn_logit_softcapping")),
        capped_logits=bool(text.get("final_logit_softcapping")),
        stored_bits=quantization_of(config)[1],
    )


class _Widths(NamedTuple):
    hidden: int
    inner: int
    queries: int
    keys: int


def _linears(kind: str, text: Mapping[str, Any], widths: _Widths) -> tuple[Linear, ...]:
    width, inner, queries, keys = widths
    if kind == "gpt2":
        return (
            Linear("attn.c_attn", width, 3 * width, bias=True),
            Linear("attn.c_proj", width, width, bias=True),
            Linear("mlp.c_fc", width, inner, bias=True),
            Linear("mlp.c_proj", inner, width, bias=True),
        )
    if kind == "phi3":
        return (
            Linear("self_attn.qkv_proj", width, queries + 2 * keys),
            Linear("self_attn.o_proj", queries, width),
            Linear("mlp.gate_up_proj", width, 2 * inner),
            Linear("mlp.down_proj", inner, width),
        )
    biased = bool(text.get("attention_bias", kind == "qwen2"))
    ffn_biased = bool(text.get("mlp_bias", False))
    return (
        Linear("self_attn.q_proj", width, queries, biased),
        Linear("self_attn.k_proj", width, keys, biased),
        Linear("self_attn.v_proj", width, keys, biased),
        Linear("self_attn.o_proj", queries, width, biased and kind == "llama"),
        Linear("mlp.gate_proj", width, inner, ffn_biased),
        Linear("mlp.up_proj", width, inner, ffn_biased),
        Linear("mlp.down_proj", inner, width, ffn_biased),
    )


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)

"""Tiny random base models in Hugging Face layout, made by transformers, for tests that need a whole model.

Sizes differ from each other (width, heads, vocabulary), so that a mixed-up dimension cannot pass unnoticed.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 272  # 256 bytes, the special tokens, and ids that no text uses

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide enough for logits that differ
}
WINDOW = 8  # tokens that a query sees in a layer with a sliding window, itself included
_HEADS = {"head_dim": 8}
_SOFT_CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None, **_HEADS),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE, **_HEADS, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_SHAPE, **_HEADS),
    "gemma2": lambda: Gemma2Config(**_SHAPE, **_HEADS, **_SOFT_CAPS),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 7}, **_HEADS, query_pre_attn_scalar=8, sliding_window=WINDOW
    ),
    "phi3": lambda: Phi3Config(**_SHAPE, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(**_GPT2),
}

# Architectures that shipped models use with a window on all layers (Mistral 7B v0.1, Phi-3 mini), or on some.
WINDOWED: dict[str, Any] = {
    "mistral-windowed": lambda: MistralConfig(**_SHAPE, sliding_window=WINDOW, **_HEADS),
    "phi3-windowed": lambda: Phi3Config(**_SHAPE, tie_word_embeddings=False, sliding_window=WINDOW),
    "gemma2-windowed": lambda: Gemma2Config(**_SHAPE, **_HEADS, **_SOFT_CAPS, sliding_window=WINDOW),
    "qwen2-windowed": lambda: Qwen2Config(
        **_SHAPE, tie_word_embeddings=True, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma3": CONFIGS["gemma3"],
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, so that lengths are known, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def make_model(directory: Path, kind: str = "llama", *, seed: int = 0, dtype: Any = torch.float32) -> Path:
    """Write a random model of one of `CONFIGS` or `WINDOWED` with its tokenizer, and return the directory."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **WINDOWED}[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that are all one or zero hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory

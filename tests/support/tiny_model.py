"""A whole model directory and an adapter for it, made on the spot: Llama's shape, random weights, bytes as tokens."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tests.support.tiny_tokenizer import tiny_backend

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate
from finetune.adapters.peft import write_adapter

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, CONTEXT = 32, 48, 2, 2, 261, 256
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write_tiny_model(path: Path, *, seed: int = 0, layers: int = LAYERS, chat_template: str | None = CHATML) -> Path:
    """config.json, weights and tokenizer, as transformers and mlx-lm load them. Weights are far from uniform."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": 3 * matrix(VOCABULARY, HIDDEN),
    }
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(layers):
        for name, shape in LINEAR.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(_config(layers)))
    _write_tokenizer(path, chat_template)
    return path


def write_tiny_adapter(path: Path, *, seed: int = 1, base: str = "", layers: int = LAYERS, rank: int = 4) -> Path:
    """A LoRA adapter on every linear module: it changes every answer, and rounding stays far below that."""
    rng = np.random.default_rng(seed)
    pairs = {
        f"model.layers.{layer}.{name}": LoraUpdate(
            rng.normal(0, 0.2, (rank, columns)).astype(np.float32), rng.normal(0, 0.2, (rows, rank)).astype(np.float32)
        )
        for layer in range(layers)
        for name, (rows, columns) in LINEAR.items()
    }
    targets = tuple(sorted(name.split(".")[-1] for name in LINEAR))
    write_adapter(path, Adapter(AdapterConfig(rank=rank, alpha=8.0, target_modules=targets, base_model=base), pairs))
    return path


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "torch_dtype": "float32",
    }


def _write_tokenizer(path: Path, chat_template: str | None) -> None:
    tiny_backend().save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = {} if chat_template is None else {"chat_template": chat_template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **names, **template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))

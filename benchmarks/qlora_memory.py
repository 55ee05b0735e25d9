"""Peak memory of loading and training: a base in 4 bits against the same base in bfloat16.

Usage: python benchmarks/qlora_memory.py --engine pytorch|mlx [--layers 12] [--tokens 64] [--bits 4]

Builds a random model in the shape of TinyLlama with few words, so that the linear weights dominate (44 M a layer),
writes it in bfloat16, and takes two LoRA steps on one short row, each side in a process of its own. The peak is the
most resident memory that the process ever had (`ru_maxrss`), from the first byte read; what Python and the engine's
libraries took before the model was opened is printed too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 2048
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in a MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("pytorch", "mlx"), required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits", choices=("4", "8"), default="4")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "QUANTIZATION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        model, quantization = arguments.measure
        print(json.dumps(measure(arguments.engine, model, quantization, arguments.tokens)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), arguments.layers)
        compare(arguments, directory)


def compare(arguments: argparse.Namespace, model: str) -> None:
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 2**20
    print(f"{arguments.engine}: weights of {weights:,.0f} MiB in bfloat16, one row of {arguments.tokens} tokens")
    found = {}
    for name in ("none", f"{arguments.bits}bit"):
        found[name] = run = in_a_process(arguments, model, name)
        print(
            f"  {'bfloat16' if name == 'none' else name:8}  peak {run['peak']:6,.0f} MiB, of which "
            f"{run['libraries']:,.0f} before the model was opened; opened in {run['opening']:.1f} s of processor "
            f"time, a step {run['step']:.2f} s; losses {run['losses']}"
        )
    dense, packed = found.values()
    print(f"  ratio of the peaks {packed['peak'] / dense['peak']:.2f}")
    above = (packed["peak"] - packed["libraries"]) / (dense["peak"] - dense["libraries"])
    print(f"  ratio above the libraries {above:.2f}")


def in_a_process(arguments: argparse.Namespace, model: str, quantization: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--engine", arguments.engine, "--tokens", str(arguments.tokens)]
    done = subprocess.run(
        [*command, "--measure", model, quantization], check=True, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(backend: str, model: str, quantization: str, tokens: int) -> dict[str, object]:
    """Two steps in this process: memory in MiB, times in seconds of processor time."""
    from finetune.adapters.lora import seeded_init
    from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
    from finetune.core.types import Batch
    from finetune.engines.registry import choose_engine

    config = ModelConfig.model_validate(
        {
            "name": "base",
            "backend": backend,
            "dtype": "bfloat16",
            "quantization": None if quantization == "none" else quantization,
        }
    )
    engine = choose_engine(config)
    engine.info()  # imports the library
    row = np.random.default_rng(0).integers(3, VOCABULARY, size=(1, tokens + 1)).astype(np.int32)
    mask, ones = np.ones((1, tokens), np.bool_), np.ones((1, tokens), np.int32)
    batch = Batch(row[:, :-1], row[:, 1:], mask, np.arange(tokens, dtype=np.int32)[None], ones)
    libraries, start = peak(), time.process_time()
    session = engine.open_training(
        Path(model), model_config=config, training=TrainingConfig(), lora=LoraConfig(rank=8), init=seeded_init(0)
    )
    opened = time.process_time()
    losses = [round(session.step([batch], learning_rate=1e-3).result().loss, 4) for _ in range(2)]
    step = (time.process_time() - opened) / 2
    return {"libraries": libraries, "peak": peak(), "opening": opened - start, "step": step, "losses": losses}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNIT


def write_model(directory: Path, layers: int) -> None:
    """A shard for each layer, all with the same random matrices: their values do not matter here."""
    rng = np.random.default_rng(0)
    shared = {
        name: bfloat16(rng.standard_normal(shape, np.float32) * shape[1] ** -0.5) for name, shape in SHAPES.items()
    }
    ones = bfloat16(np.ones(HIDDEN, np.float32))
    shared |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), ones)
    embedding = bfloat16(rng.standard_normal((VOCABULARY, HIDDEN), np.float32) * 0.02)
    shards = [{"model.embed_tokens.weight": embedding, "model.norm.weight": ones}]
    shards += [
        {f"model.layers.{layer}.{name}.weight": array for name, array in shared.items()} for layer in range(layers)
    ]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(model_config(layers)))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """safetensors by hand: NumPy has no bfloat16."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            stream.write(array.tobytes())


def model_config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


if __name__ == "__main__":
    main()

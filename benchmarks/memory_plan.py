"""Predicted against observed peaks of training steps, each in a process of its own.

Usage: python benchmarks/memory_plan.py [--only TEXT] [--json FILE]

Models are random, in the shapes of real architectures and small enough for any machine. A run is three steps of rows of
one length. Cases with a star were not looked at while the terms were worked out. MLX counts arrays; PyTorch on a CPU is
measured by the resident size of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Batch, Dtype
from finetune.engines.registry import choose_engine
from finetune.models.architecture import read_architecture
from finetune.planning.memory import plan_memory
from finetune.planning.runs import Surroundings, graphs_of, planned_run
from finetune.planning.steps import largest_batch

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": True,
    },
    "llama-deep": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 32768, "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32768, "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 8, "head_dim": 128,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 24576, "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "phi3": {
        "model_type": "phi3", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 16384, "tie_word_embeddings": False,
        "original_max_position_embeddings": 4096, "pad_token_id": 0,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "head_dim": 128,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32768, "query_pre_attn_scalar": 128,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 8, "n_head": 12, "n_positions": 2048, "n_ctx": 2048,
        "layer_norm_epsilon": 1e-5, "vocab_size": 32768,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One run to predict and to observe."""

    model: str
    engine: Literal["mlx", "pytorch"]
    method: str = "lora"
    rows: int = 2
    length: int = 512
    rank: int = 16
    quantization: str | None = None
    dtype: Dtype = "float32"
    recompute: bool = False
    fresh: bool = False  # not looked at while the terms were worked out

    @property
    def run(self) -> str:
        """What is done with the model."""
        quantized = f" {self.quantization}" if self.quantization else ""
        again = " recomputed" if self.recompute else ""
        rank = "" if self.method == "full" else f" r{self.rank}"
        return f"{self.method}{rank}, {self.rows} x {self.length}, {self.dtype}{quantized}{again}"

    @property
    def name(self) -> str:
        return f"{self.engine} {self.model} {self.run}"

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.model_validate(
            {"name": "x", "backend": self.engine, "dtype": self.dtype, "quantization": self.quantization,
             "init": "random"}
        )  # fmt: skip

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig.model_validate(
            {"method": self.method, "batch_size": self.rows, "gradient_checkpointing": self.recompute}
        )


ENGINES: tuple[Literal["mlx", "pytorch"], ...] = ("mlx", "pytorch")


def cases() -> list[Case]:
    """Architectures, methods, batches, lengths and engines, each against a base of the others."""
    found = []
    for engine in ENGINES:
        base = Case("llama", engine)
        mlx = engine == "mlx"
        found += [
            base,
            replace(base, model="qwen2"),
            replace(base, model="gemma2"),
            replace(base, model="gpt2"),
            replace(base, rows=1, length=1024),
            replace(base, method="dora"),
            replace(base, method="full"),
            replace(base, model="qwen2", quantization="4bit"),
            replace(base, recompute=True, rows=4),
            replace(base, model="qwen3"),
            replace(base, model="phi3"),
            replace(base, model="llama-deep", rows=8, length=128),
            replace(base, model="llama-deep", quantization="8bit", rank=64),
            replace(base, model="gpt2", method="dora", rows=3, length=300),
            replace(base, model="gemma2", recompute=True),
            replace(base, model="qwen3", method="full", rows=1),
            replace(base, rows=1, length=2048, fresh=mlx),
            replace(base, model="qwen2", method="dora", length=256, fresh=mlx),
            replace(base, model="phi3", rows=3, length=200, fresh=mlx),
            replace(base, model="gemma2", method="full", rows=1, length=256),
            replace(base, model="gpt2", quantization="4bit", rows=5, length=100, fresh=mlx),
        ]
    bfloat16 = Case("llama", "pytorch", rows=4, dtype="bfloat16")
    found += [bfloat16, replace(bfloat16, model="qwen3"), replace(bfloat16, model="gemma2", rows=2)]
    return [*found, *blind_cases()]


def blind_cases() -> list[Case]:
    """Chosen when all terms were there, before they were run."""
    mlx, pytorch = (Case("llama", engine, fresh=True) for engine in ENGINES)
    return [
        replace(mlx, model="qwen2", method="full", rows=1, length=200),
        replace(mlx, model="gemma2", rows=3, length=250),
        replace(mlx, model="llama-deep", rows=3, length=384, recompute=True),
        replace(mlx, model="phi3", method="dora", length=400),
        replace(mlx, method="full", rows=4, length=128),
        replace(pytorch, model="llama-deep", rows=3, length=384, recompute=True),
        replace(pytorch, model="qwen2", rows=6, length=90),
        replace(pytorch, model="phi3", method="dora", length=400),
        replace(pytorch, model="gpt2", rows=3, length=500, recompute=True),
        replace(pytorch, model="gemma2", rows=4, length=150),
        replace(pytorch, model="qwen3", quantization="8bit", rank=8, length=700),
        replace(pytorch, model="qwen2", method="full", length=150),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where observed peaks are kept; those in it are not taken again")
    parser.add_argument("--observe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.observe:
        print(json.dumps(observe(Case(**json.loads(arguments.observe)))))
        return
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else {}
    off = []
    print("| engine | model | run | predicted | observed | ratio |\n|---|---|---|---|---|---|")
    for case in cases():
        if arguments.only not in case.name:
            continue
        if case.name not in known:
            known[case.name] = in_process(case)
        if arguments.json:
            arguments.json.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        off.append(report(case, known[case.name]))
    print(f"\n{len(off)} cases: largest error {max(off):.1%}, median {median(off):.1%}")


def report(case: Case, found: dict[str, int]) -> float:
    """Print a line of the table; returns how far the prediction is off."""
    predicted, observed = predict(case, found["graphs"]), found["observed"]
    mark = " *" if case.fresh else ""
    sizes = f"{predicted / 2**20:,.0f} MiB | {observed / 2**20:,.0f} MiB | {predicted / observed:.2f}"
    print(f"| {case.engine} | {case.model} | {case.run}{mark} | {sizes} |", flush=True)
    return abs(predicted / observed - 1.0)


def in_process(case: Case) -> dict[str, int]:
    """The observed peak and the graphs that were computed side by side, from a process of its own."""
    options = {name: getattr(case, name) for name in Case.__slots__}
    command = [sys.executable, __file__, "--observe", json.dumps(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def predict(case: Case, graphs: int) -> int:
    """Bytes, of what is observed for the engine."""
    architecture = read_architecture(SHAPES[case.model])
    assert architecture is not None
    graphs = graphs_of(architecture, graphs)
    run = planned_run(
        architecture, largest_batch([[batch_of(case)]], graphs=graphs), Surroundings(case.dtype, on_cpu=True),
        model=case.model_config, training=case.training, lora=LoraConfig(rank=case.rank), engine=case.engine,
        graphs=graphs,
    )  # fmt: skip
    plan = plan_memory(architecture, run)
    return plan.arrays if case.engine == "mlx" else plan.total


def batch_of(case: Case) -> Batch:
    """Rows of random tokens, all trained on."""
    shape = (case.rows, case.length)
    tokens = np.random.default_rng(0).integers(3, SHAPES[case.model]["vocab_size"], size=(case.rows, case.length + 1))
    row = tokens.astype(np.int32)
    positions = np.tile(np.arange(case.length, dtype=np.int32), (case.rows, 1))
    return Batch(row[:, :-1], row[:, 1:], np.ones(shape, np.bool_), positions, np.ones(shape, np.int32))


def observe(case: Case) -> dict[str, int]:
    """Three steps in this process."""
    config = SHAPES[case.model] | {"architectures": ["Any"], "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    engine = choose_engine(case.model_config)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        session = engine.open_training(
            Path(folder), model_config=case.model_config, training=case.training, lora=LoraConfig(rank=case.rank),
            init=seeded_init(0),
        )  # fmt: skip
        for _ in range(3):
            session.step([batch_of(case)], learning_rate=1e-4).result()
        graphs = engine.graphs(case.model_config, case.training)
        return {"observed": session.peak_memory_bytes(), "graphs": graphs}


if __name__ == "__main__":
    main()

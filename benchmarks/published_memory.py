"""Predicted peaks of 3 to 8 B models beside published ones, as the table of docs/memory.md.

Usage: python benchmarks/published_memory.py DIRECTORY_OF_CONFIGS

The directory holds files named like llama3_1_8b.config.json. Nothing is loaded or run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.models.architecture import read_architecture
from finetune.planning.memory import MemoryPlan, plan_memory
from finetune.planning.runs import Surroundings, planned_run
from finetune.planning.steps import BatchSize

GIB, GB = 2**30, 1e9
QV = ("q_proj", "v_proj")
WITHOUT_K = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of the 0.6 B model's config.json, made the 8 B one.
QWEN3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
    "tie_word_embeddings": False, "quantization": {"bits": 4, "group_size": 64},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """A published figure and what it was measured on."""

    source: str
    model: str
    published: str
    unit: float
    part: Literal["arrays", "weights"] = "arrays"
    engine: Literal["mlx", "pytorch"] = "pytorch"
    method: str = "lora"
    rows: int = 1
    length: int = 512
    rank: int = 8
    targets: Any = "all-linear"
    quantization: str | None = None
    recompute: bool = False


SETTINGS = (
    Setting("Mistral-7B v0.3 float16, after loading", "mistral_7b_v03", "13.50 GiB", GIB, "weights", "mlx"),
    Setting("LitGPT Llama-2-7B bf16, inference", "llama2_7b", "13.52 GB", GB, "weights"),
    Setting("LitGPT Llama-2-7B NF4-dq, inference", "llama2_7b", "4.26 GB", GB, "weights", quantization="4bit"),
    Setting("Qwen3-8B 4 bits, size of the files", "qwen3_0.6b", "4.608 GB", GB, "weights", "mlx"),
    Setting("torchtune Llama-3.2-3B LoRA, 2 x 4096, recomputed", "llama3_2_3b", "8.5 GiB", GIB, rows=2, length=4096,
            recompute=True),
    Setting("torchtune Llama-3.2-3B QLoRA, 2 x 4096, recomputed", "llama3_2_3b", "4.6 GiB", GIB, rows=2, length=4096,
            quantization="4bit", recompute=True),
    Setting("torchtune Llama-3.1-8B LoRA, 2 x 512, recomputed", "llama3_1_8b", "16.2 GiB", GIB, rows=2,
            targets=WITHOUT_K, recompute=True),
    Setting("torchtune Llama-3.1-8B QLoRA, 2 x 512, recomputed", "llama3_1_8b", "7.4 GiB", GIB, rows=2,
            targets=WITHOUT_K, quantization="4bit", recompute=True),
    Setting("torchtune Llama-3.1-8B full, 2 x 512, recomputed", "llama3_1_8b", "18.9 GiB", GIB, method="full", rows=2,
            recompute=True),
    Setting("PEFT Llama-3.2-3B LoRA r32 on q, v, 4 x 768", "llama3_2_3b", "20.8 GiB", GIB, rows=4, length=768,
            rank=32, targets=QV),
    Setting("PEFT Llama-3.2-3B full, 4 x 768", "llama3_2_3b", "36.2 GiB", GIB, method="full", rows=4, length=768),
    Setting("LitGPT Llama-2-7B LoRA r8 on q, v, 1 x 512", "llama2_7b", "21.30 GB", GB, targets=QV),
    Setting("Qwen3-0.6B LoRA on a Mac, 1 x 512", "qwen3_0.6b", "about 2 GB", GB, engine="mlx", rank=16),
    Setting("Qwen3-8B 4 bits LoRA on a Mac, 1 x 512", "qwen3_0.6b", "6 to 10 GB", GB, engine="mlx", rank=16),
)  # fmt: skip


def main() -> None:
    configs = Path(sys.argv[1])
    print("| setting | published | predicted |\n|---|---|---|")
    for setting in SETTINGS:
        size = getattr(predicted(setting, configs), setting.part) / setting.unit
        unit = "GiB" if setting.unit == GIB else "GB"
        print(f"| {setting.source} | {setting.published} | {size:.{3 if size < 5 else 2}f} {unit} |")


def predicted(setting: Setting, configs: Path) -> MemoryPlan:
    """On a GPU, in 16 bits."""
    config = json.loads((configs / f"{setting.model}.config.json").read_text(encoding="utf-8"))
    architecture = read_architecture(config | (QWEN3_8B if "Qwen3-8B" in setting.source else {}))
    assert architecture is not None
    tokens = setting.rows * setting.length
    run = planned_run(
        architecture,
        BatchSize(tokens, tokens, setting.length, tokens),
        Surroundings("bfloat16", on_cpu=False),
        model=ModelConfig.model_validate({"name": "any", "quantization": setting.quantization}),
        training=TrainingConfig.model_validate({"method": setting.method, "gradient_checkpointing": setting.recompute}),
        lora=LoraConfig(rank=setting.rank, target_modules=setting.targets),
        engine=setting.engine,
    )
    return plan_memory(architecture, run)


if __name__ == "__main__":
    main()

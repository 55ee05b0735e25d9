"""Makes the demo's base model: text, tokenizer, random weights, two lessons of full training, model card.

Usage: python scripts/train_demo_model.py [--work DIR] [--output DIR] [--rows N]
Everything is drawn from fixed seeds; about half an hour on two cores with OpenBLAS. `--rows` makes a smaller one.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import finetune
from finetune.demo.data import DATA as DEMO_DATA
from finetune.demo.data import MODEL, write_splits
from finetune.demo.pretraining import Messages, conversations, drills
from finetune.demo.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, VOCABULARY, tokenizer_config, train_tokenizer

SEED = 7
CONTEXT = 2048
TOKENIZER_ROWS = 30_000
DRILL_SHARE = 0.22
LEARNING_RATE = 1.5e-3
LESSON: dict[str, Any] = {
    "method": "full",
    "learning_rate": LEARNING_RATE,
    "epochs": 1,
    "batch_size": 20,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "seed": SEED,
}
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
    "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "torch_dtype": "float32",
}


def main() -> None:
    """Run all stages in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="where the lessons are kept (default: a temporary directory)")
    parser.add_argument("--output", type=Path, default=MODEL, help="where the model goes")
    parser.add_argument("--rows", type=int, default=90_000, help="conversations in both lessons together")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="demo-model-"))
    began = time.perf_counter()
    write_splits(DEMO_DATA)
    start = make_start(work / "start")
    drill_rows = int(options.rows * DRILL_SHARE)
    first = lesson(work / "drills", start, islice(drills(SEED), drill_rows), init="random", schedule="constant")
    rest = islice(conversations(SEED), options.rows - drill_rows)
    second = lesson(work / "conversations", first, rest, init="pretrained", schedule="linear")
    publish(second, options.output)
    print(f"{options.output}: {options.rows:,} conversations, {time.perf_counter() - began:,.0f} s")


def make_start(directory: Path) -> Path:
    """The model's shape and its tokenizer: everything but weights."""
    directory.mkdir(parents=True)
    texts = (message["content"] for row in islice(conversations(SEED + 1), TOKENIZER_ROWS) for message in row)
    train_tokenizer(texts).save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", tokenizer_config(CONTEXT))
    write_json(directory / "config.json", SHAPE)
    write_json(directory / "generation_config.json", {key: SHAPE[key] for key in ("eos_token_id", "pad_token_id")})
    return directory


def lesson(directory: Path, model: Path, rows: Iterable[Messages], *, init: str, schedule: str) -> Path:
    """Train every weight of `model` on `rows` once, and return the trained model's directory."""
    data = directory.with_suffix(".jsonl")
    with data.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": row}) + "\n" for row in rows)
    result = finetune.train(
        {
            "model": {"name": str(model), "init": init},
            "training": LESSON | {"schedule": schedule},
            "data": {"train_file": str(data), "validation_split": 0.005, "max_length": 192},
            "output": {"output_dir": str(directory), "keep_checkpoints": 1, "sample_tokens": 48},
        },
        listeners=[report_progress],
    )
    return Path(result.run_dir) / "model"


def report_progress(event: Any) -> None:
    """A line for every evaluation, sample and hundredth step."""
    if event.name in {"eval", "sample", "notice"} or (event.name == "step" and event.step % 100 == 0):
        print(json.dumps(event.record()), flush=True)


def publish(trained: Path, output: Path) -> None:
    """Copy the model in float16 beside its card, which is written by hand and kept."""
    from safetensors.numpy import load_file, save_file

    output.mkdir(parents=True, exist_ok=True)
    weights = {name: array.astype("float16") for name, array in load_file(trained / "model.safetensors").items()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(trained / name, output / name)
    write_json(output / "config.json", SHAPE | {"torch_dtype": "float16"})


def write_json(path: Path, content: Any) -> None:
    """Indented, with a line end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

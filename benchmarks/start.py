"""What it takes to say one word: from the command to the first token, with nothing loaded before.

    python -m benchmarks.start --workload DIR --rounds 5

Every command is a process of its own, in turn, after one round that warms the files up. The peers are the commands or
the shortest scripts that their documentation gives.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.machine import describe_machine
from benchmarks.workload import make_workload

HERE = Path(__file__).resolve().parent
BY_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
asked = [{"role": "user", "content": "Hello"}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""
PAIRS = (("finetune-mlx", "mlx-lm"), ("finetune-pytorch", "transformers"))
UNITS = {"seconds": "s", "processor": "processor s", "resident": "MB at the peak"}


def commands(model: Path) -> dict[str, list[str]]:
    """What a person would type, by side."""
    asked = ["--model", str(model), "--prompt", "Hello", "--max-tokens", "1"]
    ours = [sys.executable, "-m", "finetune", "generate", *asked]
    return {
        "finetune-mlx": [*ours, "--backend", "mlx"],
        "mlx-lm": [sys.executable, "-m", "mlx_lm", "generate", *asked],
        "finetune-pytorch": [*ours, "--backend", "pytorch"],
        "transformers": [sys.executable, "-c", BY_TRANSFORMERS, str(model)],
    }


def measure(command: list[str]) -> dict[str, float]:
    """One run: seconds, processor seconds of all its threads, and its largest resident size in MB."""
    began = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=HERE.parent, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"This failed; run it by itself to see why: {' '.join(command)}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - began, "processor": processor, "resident": kilobytes / 1000}


def main() -> None:
    """Measure all sides in turn, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, default=HERE / "workload", help="where models and rows are made")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where figures are kept")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for folder in (arguments.workload, arguments.results):
        folder.mkdir(parents=True, exist_ok=True)
    make_workload(arguments.workload, None)
    sides = commands(arguments.workload / "nano30")
    rounds = [{side: measure(command) for side, command in sides.items()} for _ in range(arguments.rounds + 1)][1:]
    medians = {side: {key: median(one[side][key] for one in rounds) for key in UNITS} for side in sides}
    for side, figures in medians.items():
        print(f"{side:18}", ", ".join(f"{figures[key]:.1f} {unit}" for key, unit in UNITS.items()))
    ratios = {
        f"{our} / {peer}": {key: round(median(one[our][key] / one[peer][key] for one in rounds), 2) for key in UNITS}
        for our, peer in PAIRS
    }
    document = {"machine": describe_machine(), "rounds": rounds, "medians": medians, "ratios": ratios}
    (arguments.results / "start.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()

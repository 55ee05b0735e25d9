"""Decoding of many requests at once, without a server: this project's generators against mlx-lm and transformers.

    python -m benchmarks.generation --workload DIR --rounds 3

Every side reads the same prompts and decodes the same number of tokens greedily, each in a process of its own, in
turn. mlx-lm's `BatchGenerator` and transformers' `generate` have one adapter for a whole batch: with four adapters
they decode a group after the other, with the model in memory all the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.servers import ADAPTERS, prompts_of, write_adapters
from benchmarks.workload import make_workload

HERE = Path(__file__).resolve().parent
AT_ONCE = 16
TOKENS = 64  # of each answer
SIDES = ("finetune-mlx", "mlx-lm", "finetune-pytorch", "transformers")
PAIRS = (("finetune-mlx", "mlx-lm"), ("finetune-pytorch", "transformers"))

Prompts = Sequence[tuple[int, ...]]
Decode = Callable[[Prompts, Sequence[str]], int]


def ours(backend: str, model: Path, adapters: Path) -> Decode:
    """All requests in one generator, whatever their adapters."""
    from finetune.config.schema import ModelConfig
    from finetune.core.types import GenerationRequest
    from finetune.engines.registry import choose_engine

    config = ModelConfig.model_validate({"name": str(model), "backend": backend, "dtype": "float32"})
    paths = {name: adapters / "peft" / name for name in ADAPTERS}
    session = choose_engine(config).open_inference(model, model_config=config, adapters=paths)

    def decode(prompts: Prompts, names: Sequence[str]) -> int:
        generator, tokens = session.generator(), 0
        for prompt, name in zip(prompts, names, strict=True):
            generator.add(GenerationRequest(prompt, TOKENS, adapter=name))
        while generator.busy:
            tokens += sum(event.token is not None for event in generator.step())
        return tokens

    return decode


def by_mlx_lm(model: Path, adapters: Path) -> Decode:
    """A batch for each adapter, in mlx-lm's own generator, over models that share nothing but the files."""
    import finetune.engines.mlx  # noqa: F401 - loads the same OpenBLAS; the wheel's own BLAS is 30 times slower

    # isort: split
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator

    models = {name: load(str(model), adapter_path=str(adapters / "mlx" / name))[0] for name in ADAPTERS}

    def decode(prompts: Prompts, names: Sequence[str]) -> int:
        tokens = 0
        for name in dict.fromkeys(names):
            group = [list(prompt) for prompt, own in zip(prompts, names, strict=True) if own == name]
            generator = BatchGenerator(models[name], stop_tokens=[], completion_batch_size=AT_ONCE)
            generator.insert(group, [TOKENS] * len(group))
            while answers := generator.next_generated():
                tokens += len(answers)
            generator.close()
        return tokens

    return decode


def by_transformers(model: Path, adapters: Path) -> Decode:
    """A padded batch for each adapter, with PEFT's layers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapters / "peft" / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        tuned.load_adapter(adapters / "peft" / name, adapter_name=name)

    def decode(prompts: Prompts, names: Sequence[str]) -> int:
        tokens = 0
        for name in dict.fromkeys(names):
            tuned.set_adapter(name)
            group = [prompt for prompt, own in zip(prompts, names, strict=True) if own == name]
            longest = max(map(len, group))
            inputs = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in group])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in group])
            limits = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            found = tuned.generate(input_ids=inputs, attention_mask=mask, pad_token_id=0, **limits)
            tokens += (found.shape[1] - longest) * len(group)
        return tokens

    return decode


def run_side(side: str, model: Path, adapters: Path, texts: Path) -> None:
    """Decode twice with one adapter and twice with four, and print the second figures as one JSON line."""
    from finetune.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.open(model)
    groups = [[tokenizer.prompt_ids(text) for text in group] for group in json.loads(texts.read_text())]
    makers: dict[str, Callable[[], Decode]] = {
        "finetune-mlx": lambda: ours("mlx", model, adapters),
        "finetune-pytorch": lambda: ours("pytorch", model, adapters),
        "mlx-lm": lambda: by_mlx_lm(model, adapters),
        "transformers": lambda: by_transformers(model, adapters),
    }
    decode = makers[side]()
    figures = {}
    for label, names in (("one", ADAPTERS[:1] * AT_ONCE), ("four", ADAPTERS * (AT_ONCE // len(ADAPTERS)))):
        for prompts in groups:  # others each time: nothing is remembered; the first group warms up
            wall, processor = time.perf_counter(), time.process_time()
            tokens = decode(prompts, names)
            figures[label] = tokens / (time.perf_counter() - wall)
            figures[f"{label}_cpu"] = tokens / (time.process_time() - processor)
    print(json.dumps(figures))


def measure(side: str, model: Path, adapters: Path, texts: Path) -> dict[str, float]:
    """One run of one side, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generation", "--side", side, str(model), str(adapters), str(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds of each pair's ratio: more than 1 means that this project is faster."""
    return {
        f"{our} / {peer}": {
            key: round(median(a[key] / b[key] for a, b in zip(runs[our], runs[peer], strict=True)), 2)
            for key in runs[our][0]
        }
        for our, peer in PAIRS
        if our in runs and peer in runs
    }


def main() -> None:
    """Parse the command line, measure all sides in turn, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, default=HERE / "workload", help="where models and rows are made")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where figures are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SIDES, action="append", help="only this side; may be repeated")
    parser.add_argument("--side", nargs=4, metavar=("SIDE", "MODEL", "ADAPTERS", "TEXTS"), help="one run, by itself")
    arguments = parser.parse_args()
    if arguments.side:
        side, *paths = arguments.side
        run_side(side, *map(Path, paths))
        return
    for folder in (arguments.workload, arguments.results):
        folder.mkdir(parents=True, exist_ok=True)
    make_workload(arguments.workload, None)
    texts = prompts_of(arguments.workload)[: 2 * AT_ONCE]
    runs: dict[str, list[dict[str, float]]] = {}
    load = [round(one, 2) for one in os.getloadavg()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapters(arguments.workload / "nano30", folder)
        (folder / "texts.json").write_text(json.dumps([texts[:AT_ONCE], texts[AT_ONCE:]]))
        for number in range(arguments.rounds):
            for side in arguments.only or SIDES:
                figures = measure(side, arguments.workload / "nano30", folder, folder / "texts.json")
                runs.setdefault(side, []).append(figures)
                print(
                    f"round {number + 1}, {side}: {json.dumps({k: round(v, 1) for k, v in figures.items()})}",
                    flush=True,
                )
    document: dict[str, Any] = {"machine": describe_machine(), "load_average_before": load}
    document |= {"requests": AT_ONCE, "tokens": TOKENS, "runs": runs, "ratios": ratios(runs)}
    (arguments.results / "generation.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document["ratios"], indent=2))


if __name__ == "__main__":
    main()

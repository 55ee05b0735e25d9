"""`python -m benchmarks.data`: rows to tokens and masks, beside `datasets.map` with the same tokenizer and template.

Both sides read the same JSONL in so many processes, render, tokenise and mask every row, and leave the result on the
disk. Each run is a process of its own with an empty cache. Rates are wall time and, because other programs take part
of a busy machine, processor seconds of all processes of a side; the peak is the memory of all of them together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.conversations import write_conversations

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one side."""

    side: str
    seconds: float
    processor_seconds: float
    peak_bytes: int  # of all processes together, without the pages of files that they share with the system
    rows: int
    tokens: int
    trained_tokens: int


def ours(data: Path, model: Path, folder: Path, processes: int) -> dict[str, int]:
    """This project: everything that a run does with its data before the first step."""
    os.environ |= {"FT_CACHE_DIR": str(folder), "FT_DATA_PROCESSES": str(processes)}
    from finetune.config.schema import DataConfig
    from finetune.data.prepare import prepare_data
    from finetune.data.tokenizer import TextTokenizer

    config = DataConfig(train_file=str(data), template=TEMPLATE, validation_split=0)
    found = prepare_data(config, tokenizer=TextTokenizer.open(model), context_length=None, seed=0)
    return {key: found.fingerprints[key] for key in ("rows", "tokens", "trained_tokens")}


def peer(data: Path, model: Path, folder: Path, processes: int) -> dict[str, int]:
    """What people do with `datasets` and `transformers`."""
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            row["conversations"],
            chat_template=TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    loaded = load_dataset("json", data_files=str(data), split="train")
    mapped = loaded.map(encode, num_proc=processes, remove_columns=loaded.column_names)
    return {"rows": len(mapped), **_counted(mapped)}


def _counted(mapped: Any) -> dict[str, int]:
    from pyarrow import compute

    columns = {"tokens": "input_ids", "trained_tokens": "assistant_masks"}
    flat = {
        name: [compute.list_flatten(chunk) for chunk in mapped.data[column].chunks] for name, column in columns.items()
    }
    trained = sum(compute.sum(chunk).as_py() or 0 for chunk in flat["trained_tokens"])
    return {"tokens": sum(len(chunk) for chunk in flat["tokens"]), "trained_tokens": trained}


SIDES = {"finetune": ours, "datasets.map": peer}


def measured(side: str, data: Path, model: Path, processes: int) -> Measured:
    """Run one side, and watch its processes."""
    import psutil

    before, began = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.data", "--side", side, str(data), str(model), str(processes)]
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, _held(root))
        time.sleep(0.1)
    seconds, after = time.perf_counter() - began, os.times()
    assert process.stdout is not None
    said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} failed")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(side, seconds, used, peak, **json.loads(said.splitlines()[-1]))


def _held(root: Any) -> int:
    import psutil

    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    except psutil.NoSuchProcess:
        return 0
    return total


def main() -> None:
    """Both sides in turn, and the ratio of their medians."""
    parser = argparse.ArgumentParser(prog="benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--source", type=Path, required=True, help="JSONL of conversations to vary")
    parser.add_argument("--match", choices=SIDES, help="only this side")
    parser.add_argument("--results", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_conversations(data, given.rows, source=given.source)
        print(f"{given.rows:,} rows, {data.stat().st_size / 1e9:.2f} GB", flush=True)
        found = []
        for _ in range(given.rounds):
            for side in [given.match] if given.match else SIDES:
                found.append(measured(side, data, given.model, given.processes))
                print(json.dumps(asdict(found[-1])), flush=True)
    if not given.match:
        for what in ("seconds", "processor_seconds", "peak_bytes"):
            sides = [median(getattr(run, what) for run in found if run.side == side) for side in SIDES]
            print(f"{what}: finetune {sides[0]:,.1f}, datasets.map {sides[1]:,.1f}: {sides[1] / sides[0]:.2f} x")
    if given.results:
        given.results.write_text(json.dumps([asdict(run) for run in found], indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        name, data, model, processes = sys.argv[2:6]
        with tempfile.TemporaryDirectory() as cache:
            print(json.dumps(SIDES[name](Path(data), Path(model), Path(cache), int(processes))))
    else:
        main()

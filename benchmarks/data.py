"""`python -m benchmarks.data`: rows to tokens and masks, beside `datasets.map` with the same tokenizer and template.

Both sides read the same JSONL in so many processes, render, tokenise and mask every row, and leave the result on the
disk. Each run is a process of its own with an empty cache; "finetune again" is one that finds what the run before it
left. Rates are wall time and, because other programs take part of a busy machine, processor seconds of all processes
of a side; peaks are the memory of all of them together, and of the main one.

A million rows take `datasets.map` some ten minutes. `--match` runs one side, and `--first` with `--rows` one part of
the rows: runs are added to the results file, and sides are compared by their rows a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.conversations import write_conversations
from benchmarks.machine import describe_machine

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


RESULTS = Path(__file__).parent / "results" / "data.json"
AGAIN = "finetune again"


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one side. Peaks are without the pages of files, which the system takes back when it needs room."""

    side: str
    first: int  # row of the million, as many as are left out before it
    seconds: float
    processor_seconds: float
    peak_bytes: int  # of all processes together
    main_peak_bytes: int
    load_average: float  # before
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


SIDES = {"finetune": ours, AGAIN: ours, "datasets.map": peer}


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides do."""

    data: Path
    first: int
    model: Path
    processes: int

    def measured(self, side: str, cache: Path) -> Measured:
        """Run one side, and watch its processes."""
        before, began, load = os.times(), time.perf_counter(), os.getloadavg()[0]
        what = ["--side", side, str(self.data), str(self.model), str(cache), str(self.processes)]
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.data", *what], stdout=subprocess.PIPE, text=True)
        everything, main = _watched(process)
        seconds, after = time.perf_counter() - began, os.times()
        assert process.stdout is not None
        said = process.stdout.read()
        if process.returncode:
            raise SystemExit(f"{side} failed")
        used = after.children_user + after.children_system - before.children_user - before.children_system
        found = json.loads(said.splitlines()[-1])
        return Measured(side, self.first, seconds, used, everything, main, load, **found)


def _watched(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """The most that all processes held together, and the first one, until it ends."""
    import psutil

    root, everything, main = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        try:
            held = [_held(one) for one in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            continue
        everything, main = max(everything, sum(held)), max(main, held[0])
        time.sleep(0.05)
    return everything, main


def _held(process: Any) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def run(task: Task, sides: Sequence[str]) -> Iterator[Measured]:
    """The sides in turn, "again" in the cache of the one before it."""
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            cache = Path(folder) / side.removesuffix(" again")
            found = task.measured(side, cache)
            print(json.dumps(asdict(found)), flush=True)
            yield found


def kept(results: Path, found: Sequence[Measured]) -> list[Measured]:
    """All runs of a results file with these added."""
    earlier = json.loads(results.read_text(encoding="utf-8"))["runs"] if results.is_file() else []
    runs = [*(Measured(**one) for one in earlier), *found]
    document = {"machine": describe_machine(), "runs": [asdict(one) for one in runs]}
    results.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return runs


def compare(runs: Sequence[Measured]) -> None:
    """For each number of rows and side: rows a second, microseconds of processor a row, and peaks."""
    for rows in sorted({one.rows for one in runs}):
        print(f"{rows:,} rows")
        for side in SIDES:
            chosen = [one for one in runs if (one.side, one.rows) == (side, rows)]
            if chosen:
                speed = median(one.rows / one.seconds for one in chosen)
                work = median(one.processor_seconds / one.rows for one in chosen)
                peaks = (max(getattr(one, name) for one in chosen) / 1e6 for name in ("peak_bytes", "main_peak_bytes"))
                all_of_them, main = peaks
                print(
                    f"  {side}: {speed:,.0f} rows/s, {work * 1e6:,.0f} us of processor a row, "
                    f"peak {all_of_them:,.0f} MB, main process {main:,.0f} MB ({len(chosen)} runs)"
                )


def main() -> None:
    """Both sides in turn, added to the results."""
    parser = argparse.ArgumentParser(prog="benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="rows that are left out before these")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--source", type=Path, required=True, help="JSONL of conversations to vary")
    parser.add_argument("--match", choices=["finetune", "datasets.map"], help="only this side")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to which the figures are added")
    given = parser.parse_args()
    sides = [side for side in SIDES if given.match is None or side.startswith(given.match)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_conversations(data, given.rows, source=given.source, first=given.first)
        print(f"{given.rows:,} rows, {data.stat().st_size / 1e9:.2f} GB", flush=True)
        task = Task(data, given.first, given.model, given.processes)
        found = [one for _ in range(given.rounds) for one in run(task, sides)]
    compare(kept(given.results, found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side, data, model, cache, processes = sys.argv[2:7]
        print(json.dumps(SIDES[side](Path(data), Path(model), Path(cache), int(processes))))
    else:
        main()

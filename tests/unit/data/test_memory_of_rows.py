"""Memory does not grow with the rows: neither while a file is read, nor in the account of what was read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")


def peak_of(program: str, *arguments: str) -> int:
    """The most KB that a process held, without pages of files, which the system takes back when it needs room."""
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=ROOT)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        held = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *held, 0)
        try:
            process.wait(0.005)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0
    return peak


READ = """
import sys
from pathlib import Path
from finetune.data import load
from tests.unit.data.test_large_data import prepared
load.LARGE = 0
prepared(Path(sys.argv[1]))
"""


def test_reading_a_file_takes_the_memory_of_a_piece(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_DATA_PROCESSES", "1")
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    answer = "It is number {} of many, and the answer is yes. "
    peaks = []
    for rows in (2_000, 16_000):
        path = tmp_path / f"{rows}.jsonl"
        rows_of_file = ({"prompt": f"Number {n}?", "completion": answer.format(n) * (1 + n % 24)} for n in range(rows))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
        peaks.append(peak_of(READ, str(path)))

    # Held whole, the larger file would add 8 MB, its rows 20, its tokens 8 and the records of its rows 1.2. Buffers,
    # and what the C library keeps, take 0.5 to 0.8 to reach their size.
    assert path.stat().st_size > 10e6
    assert peaks[1] - peaks[0] < 1_500


# A store of so many rows of two tokens, each different, takes the place of what a file would come to.
ACCOUNT = """
import sys
from pathlib import Path
import numpy as np
from finetune.config.schema import DataConfig, DataFile
from finetune.data import load
from finetune.data.batching import BatchPlan, evaluation_batches
from finetune.data.formats import Shape
from finetune.data.token_store import ROW, DirectoryWriter, checksum, open_store
from finetune.data.prepare import prepare_data
from finetune.data.tokenizer import TextTokenizer
from tests.unit.data.test_large_data import DEMO

file, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rng, size = np.random.default_rng(0), 5_000
with DirectoryWriter(folder) as writer:
    for first in range(0, count, size):
        table, mask = np.zeros(size, ROW), np.tile([False, True], size)
        table["start"], table["length"], table["trained"], table["trained_from"] = np.arange(size) * 2, 2, 1, 1
        table["line"] = table["number"] = np.arange(first, first + size)
        table["checksum"] = checksum(np.arange(2, dtype=np.uint16), mask[:2])
        table["row"], table["prompt"] = (rng.integers(0, 2**64, (size, words), np.uint64) for words in (2, 4))
        table["label"] = rng.integers(0, 2, size)
        table["row"][::50] = table["row"][0]
        writer.add(table, np.tile(np.arange(2, dtype=np.uint16), size), mask)
store, facts = open_store(folder, np.uint16), load._Facts(rows=count, shape=Shape("prompt", "", {}))
load._stored = lambda *_: (store, facts)

config = DataConfig(train_file=[DataFile(path=str(file), weight=1.5)], include_undesirable=True)
data = prepare_data(config, tokenizer=TextTokenizer.open(DEMO / "model"), context_length=None, seed=42)
plan = BatchPlan(data.train, rows_per_step=4, max_rows=4, max_tokens=None, seed=0, pad_id=0)
plan.step(0), plan.step(plan.steps_per_epoch)
next(iter(evaluation_batches(data.validation, max_rows=4, max_tokens=None, pad_id=0)))
assert len(data.train) > 1.3 * 0.9 * count
assert sum(1 for _ in data.left_out) > count // 60
"""


def test_the_account_of_the_rows_takes_the_memory_of_a_window(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    peaks = []
    for rows in (20_000, 250_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        peaks.append(peak_of(ACCOUNT, str(file), str(folder), str(rows)))

    # One number of four bytes for each row would add 0.9 MB.
    assert peaks[1] - peaks[0] < 900

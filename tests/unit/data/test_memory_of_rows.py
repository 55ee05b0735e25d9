"""Memory does not grow with the rows: neither while a file is read, nor in the account of what was read."""

import ctypes
import gc
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.unit.data.test_large_data import DEMO

from finetune.data import workers
from finetune.data.blocks import Block
from finetune.data.columns import pieces_of
from finetune.data.conversations import parse_messages
from finetune.data.encoding import Encoder, Reading, read_chunk
from finetune.data.groups import Keyed, keyed
from finetune.data.templates import choose_template
from finetune.data.tokenizer import TextTokenizer

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


def conversations(path: Path, rows: int) -> None:
    """Rows of 6 to 900 tokens in words that the first hundred have already."""
    rng, words = random.Random(0), [f"{begin}{end}" for begin in "bcdfgklm" for end in ("a", "er", "ing", "ow")]
    with path.open("w") as file:
        for number in range(rows):
            answer = " ".join(rng.choices(words, k=rng.randrange(1, 300)))
            file.write(json.dumps({"prompt": f"Number {number}?", "completion": answer}) + "\n")


def test_reading_takes_the_memory_of_a_few_pieces_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("FT_DATA_PROCESSES", "1")
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    peaks = []
    for rows in (20, 2_000, 12_000):
        path = tmp_path / f"{rows}.jsonl"
        conversations(path, rows)
        peaks.append(peak_of(READ, str(path)))

    # Held whole, the largest file would add 8 MB, its tokens 7, and the records of its rows 1. In pieces of 512 KB
    # instead of 64 even the second adds 9 MB to the first. The differences are 0.1 to 0.5 MB.
    assert path.stat().st_size > 7.5e6
    assert peaks[1] - peaks[0] < 1_000
    assert peaks[2] - peaks[1] < 700


# Seven rows of each length, all at once: as many freed arrays of each small size as NumPy would keep.
LENGTHS = """
import ctypes
from finetune.data.near import _jaccard, _runs
from finetune.data.rows import Example, Origin
from finetune.data.templates import choose_template
from finetune.data.tokenize import encode_each
from finetune.data.tokenizer import TextTokenizer
from tests.unit.data.test_large_data import DEMO

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # of mallinfo(3)
class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Allocated

tokenizer = TextTokenizer.open(DEMO / "model")
template = choose_template("plain", tokenizer)
def left(lengths):
    examples = [Example(Origin("a", 1), (), text="a b" * words) for words in lengths for _ in range(7)]
    encode_each(examples, template=template, tokenizer=tokenizer)
    for example in examples:
        _jaccard(_runs(example.text), _runs(example.text))
    del examples
    allocated = library.mallinfo2()
    return allocated.uordblks + allocated.hblkhd
before = left([250] * 500)
print(left(range(1, 500)) - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc says what is allocated since 2.33")
def test_rows_of_all_lengths_leave_no_memory_behind():
    # Without Python's own allocator, so that the C library knows of every byte.
    environment = {**os.environ, "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", LENGTHS]
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)

    # 41 KB; 100 where NumPy is given arrays of every length for near copies, and 470 where it is for tokens: each of
    # them may keep a page from the system.
    assert int(said.stdout) < 75_000


def test_what_goes_to_other_processes_and_back_leaves_nothing_behind():
    chunk, reading = Block(b'{"text": "a b"}\n' * 3, 1, 0), Reading(Path("a.jsonl"), {}, "text")
    found = read_chunk(chunk, reading, None)

    def blocks_after(chunks: int) -> int:
        for _ in range(chunks):
            for value in ((chunk, reading, None), found):
                pipe = io.BytesIO()
                workers._send(pipe, value)
                pipe.seek(0)
                workers._receive(pipe)
        return sys.getallocatedblocks()

    gc.collect()
    gc.disable()  # for it takes away what Python keeps of freed tuples
    try:
        before = blocks_after(100)
        # 3, and 3,400 where chunks and results are dataclasses with slots.
        assert blocks_after(1_000) - before < 100
    finally:
        gc.enable()


def peak_of_chunk(lines: list[str], encoder: Encoder | None) -> float:
    """The most bytes that are held while a chunk is read, for each byte of it."""
    content = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines).encode()
    block, reading = Block(content, 1, 0), Reading(Path("a.jsonl"), {}, "text")
    read_chunk(block, reading, encoder)
    tracemalloc.start()
    read_chunk(block, reading, encoder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / len(content)


LINES = ["a small step for every day " * 30] * 80


def test_a_chunk_takes_a_few_times_its_bytes():
    tokenizer = TextTokenizer.open(DEMO / "model")

    # 4.8, and 14 where the ranges of all its tokens are held at once.
    assert peak_of_chunk(LINES, Encoder(choose_template("plain", tokenizer), tokenizer)) < 7


def test_a_wide_character_makes_its_own_row_wide_and_not_the_chunk():
    wide = peak_of_chunk([*LINES, "\N{ROCKET}"], None)

    # As a text of the whole chunk it would add 3: four bytes for each character, and not one.
    assert wide < peak_of_chunk(LINES, None) + 0.5


def test_conversations_of_all_lengths_leave_no_tuples_behind():
    message = {"role": "user", "content": "a"}
    gc.collect()
    before = sys.getallocatedblocks()
    for turns in range(1, 20):
        for _ in range(500):
            parse_messages([message] * turns)

    # Python keeps freed tuples for later: 29 here, and 9,000 of those that are made from a generator.
    assert sys.getallocatedblocks() - before < 1_000


def test_rows_with_one_key_are_compared_where_they_lie():
    count = 50_000
    records = keyed(np.arange(count), np.zeros((count, 4), np.uint64))
    rows = Keyed(lambda: pieces_of(records), count)
    tracemalloc.start()
    for _ in rows:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # 41 bytes a row, for their order and their groups; a copy of them would add as much.
    assert peak < 60 * count


# A process that is given ten chunks, for each of which a library leaves 3,800 such tuples.
PROCESS = """
import sys
from finetune.core.machine import own_memory
from finetune.data import workers

def read_chunk(*_):
    for length in range(1, 20):
        for _ in range(200):
            tuple(number for number in range(length))
    held.append(own_memory())

held = []
workers.read_chunk = read_chunk
workers.serve()
print(held[-1] - held[0], file=sys.stderr)
"""


def test_a_process_that_reads_gives_back_what_python_keeps_of_each_chunk():
    given = pickle.dumps((None, None, None)) * 10
    said = subprocess.run([sys.executable, "-c", PROCESS], input=given, cwd=ROOT, check=True, capture_output=True)

    # Less than before, and 3.6 MB more where they stay.
    assert int(said.stderr) < 1_000_000


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

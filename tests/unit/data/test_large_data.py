"""Large data: the same bits by any way, in memory that does not grow, and clean ends."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import psutil
import pytest

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError, UsageError
from finetune.core.paths import cache_directory
from finetune.data import load, workers
from finetune.data.prepare import PreparedData, prepare_data
from finetune.data.tokenizer import TextTokenizer

DEMO = Path(str(resources.files("finetune.demo")))

# Of test.jsonl, prepared before rows were streamed, cached or shared among processes.
GOLDEN = "c9f2b9ac65d822a60c5b07da93794277029c1b223cac48231783655c77bf8c05"


def prepared(path: Path, **options) -> PreparedData:
    config = DataConfig(train_file=str(path), **options)
    return prepare_data(config, tokenizer=TextTokenizer.open(DEMO / "model"), context_length=None, seed=42, samples=3)


def as_large(monkeypatch: pytest.MonkeyPatch, *, processes: int) -> None:
    """Treat every file as a large one."""
    monkeypatch.setattr(load, "LARGE", 0)
    monkeypatch.setenv("FT_DATA_PROCESSES", str(processes))


def rows_of(data: PreparedData) -> list[tuple[str, bytes, bytes]]:
    return [(str(row.origin), row.input_ids.tobytes(), row.loss_mask.tobytes()) for row in data.train]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """1 MB: several chunks, with copies, bad rows and roles that alternate."""
    rows = (DEMO / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines() * 3
    rows[5] = '{"messages": [{"role": "user", "content": "and?"}]}'
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(rows * (1 + 1_100_000 // len("\n".join(rows)))), encoding="utf-8")
    return path


def test_tokens_masks_and_split_are_those_of_the_first_version(monkeypatch):
    assert prepared(DEMO / "data" / "test.jsonl").fingerprints["sha256"] == GOLDEN
    as_large(monkeypatch, processes=1)
    assert prepared(DEMO / "data" / "test.jsonl").fingerprints["sha256"] == GOLDEN


def test_any_number_of_processes_and_the_cache_give_the_same_bits(chats, monkeypatch):
    small = prepared(chats)
    as_large(monkeypatch, processes=2)
    shared, again = prepared(chats), prepared(chats)

    assert rows_of(small) == rows_of(shared) == rows_of(again)
    assert small.fingerprints == shared.fingerprints == again.fingerprints
    assert small.report == shared.report == again.report
    assert small.notices == shared.notices
    assert small.samples == shared.samples
    assert small.train_lengths.tolist() == [len(row) for row in shared.train]
    assert list(map(str, small.left_out)) == list(map(str, again.left_out))


@pytest.mark.parametrize("kind", ["csv", "json", "gz"])
def test_every_format_takes_the_same_ways(tmp_path, monkeypatch, kind):
    rows = [{"prompt": f"Is {n} even?", "completion": "yes\nindeed" if n % 2 == 0 else "no"} for n in range(700)]
    path = tmp_path / f"rows.{'jsonl.gz' if kind == 'gz' else kind}"
    if kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    small = prepared(path)
    as_large(monkeypatch, processes=2)

    assert len(small.train) == 630
    assert rows_of(prepared(path)) == rows_of(small)


def test_a_second_run_reads_the_tokens_that_the_first_left(chats, monkeypatch):
    as_large(monkeypatch, processes=1)
    first = prepared(chats)
    monkeypatch.setattr(load, "_read", None)  # nothing is tokenised again

    assert prepared(chats).fingerprints == first.fingerprints


def test_a_damaged_entry_is_made_again(chats, monkeypatch):
    as_large(monkeypatch, processes=1)
    first = prepared(chats)
    [ids] = (cache_directory() / "tokens").glob("*/ids.bin")
    content = bytearray(ids.read_bytes())
    content[100] ^= 64
    ids.write_bytes(content)

    assert prepared(chats).fingerprints == first.fingerprints
    assert ids.read_bytes() != content


@pytest.mark.parametrize(
    "change",
    [{"template": "chatml"}, {"train_on_prompt": True}, {"columns": {"label": "label"}}],
    ids=["template", "prompts", "columns"],
)
def test_what_rows_depend_on_makes_another_entry(tmp_path, monkeypatch, change):
    as_large(monkeypatch, processes=1)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "c", "completion": "d"}\n')
    for options in ({}, change, {}):
        prepared(
            path, template=options.get("template", "alpaca"), **{k: v for k, v in options.items() if k != "template"}
        )

    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_a_rare_first_shape_does_not_decide(tmp_path):
    path = tmp_path / "rows.jsonl"
    odd = '{"text": "plain"}\n' * 20
    filling = "x" * 600_000  # a chunk of its own
    chat = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "no"}]} for n in range(900)
    ]
    path.write_text(odd + json.dumps({"text": filling}) + "\n" + "".join(json.dumps(row) + "\n" for row in chat))
    data = prepared(path, max_error_rate=0.1)

    assert data.report.files[0].shape == "conversations (messages: role, content)"
    assert data.report.rows.dropped == 21
    assert data.template.name == "tokenizer"


def test_damaged_lines_in_any_chunk_are_named_together(tmp_path, monkeypatch):
    good = json.dumps({"prompt": "a" * 500, "completion": "b"}) + "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(good * 1_500 + "{\n" + good * 1_500 + "[\n")
    as_large(monkeypatch, processes=2)

    with pytest.raises(DataError, match=r"2 lines cannot be read[\s\S]*rows\.jsonl:1501:[\s\S]*rows\.jsonl:3002:"):
        prepared(path)


def test_a_worker_that_is_killed_is_said_and_leaves_no_process(chats, monkeypatch):
    as_large(monkeypatch, processes=2)
    begin = workers._Worker.read

    def killed_before(worker, *arguments):
        worker._process.send_signal(signal.SIGKILL)
        return begin(worker, *arguments)

    monkeypatch.setattr(workers._Worker, "read", killed_before)
    with pytest.raises(DataError, match=r"ended before its work was done \(signal SIGKILL\).*FT_DATA_PROCESSES=1"):
        prepared(chats)
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def files_allowed() -> Iterator[int]:
    """As few open files beside those of this process as macOS allows, or fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = sum(1 for _ in Path("/dev/fd").iterdir()) + 150
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    yield allowed
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def directory_of_files(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.jsonl").write_text(json.dumps({"text": f"This is the text of file {number}."}) + "\n")
    return folder


def test_a_directory_may_hold_more_files_than_a_process_may_open(tmp_path, monkeypatch, files_allowed):
    as_large(monkeypatch, processes=1)
    data = prepared(directory_of_files(tmp_path / "data", files_allowed // 3 + 1))
    assert len(data.train) + len(data.validation) == files_allowed // 3 + 1
    assert rows_of(data)


def test_more_files_than_the_system_allows_are_refused(tmp_path, monkeypatch):
    as_large(monkeypatch, processes=1)
    monkeypatch.setattr(load, "allow_open_files", lambda more: more < 128 + 9)
    with pytest.raises(UsageError, match=r"3 data files need 3 open files each.*ulimit -n 265"):
        prepared(directory_of_files(tmp_path / "data", 3))


STOPPED = "from finetune.data import load; load.LARGE = 0; from finetune.cli.main import main; main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_ends_the_workers_and_leaves_nothing_behind(chats, monkeypatch, number):
    cache = chats.parent / "cache"
    monkeypatch.setenv("FT_DATA_PROCESSES", "2")
    chats.write_text(chats.read_text(encoding="utf-8") * 20, encoding="utf-8")
    command = [sys.executable, "-c", STOPPED, "dataset", "info", str(chats), "--model", "demo"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 100
    children: list[psutil.Process] = []
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        children = psutil.Process(process.pid).children()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # Ctrl-C reaches the whole group
    _, said = process.communicate(timeout=60)

    assert len(children) == 2
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said == b"Stopped.\n"
        assert list((cache / "tokens").iterdir()) == []

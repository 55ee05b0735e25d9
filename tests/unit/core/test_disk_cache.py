"""Entries of a cache on disk are whole or absent, whoever writes, dies, deletes or damages."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune.core.disk_cache import DiskCache, cache_limit
from finetune.core.errors import UsageError


def never(place: Path) -> None:
    pytest.fail(f"{place} is said to be damaged")


def writes(text: str):
    return lambda directory: (directory / "part").write_text(text)


def test_what_was_added_is_found_whole(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 10**9)
    assert cache.find("one", on_damage=never) is None
    cache.add("one", writes("hello"), {"bits": 4})
    found = cache.find("one", on_damage=never)

    assert found is not None
    assert (found.path / "part").read_text() == "hello"
    assert (found.bytes, found.facts) == (5, {"bits": 4})


@pytest.mark.parametrize("file", ["part", "entry.json"])
def test_a_damaged_entry_is_deleted_and_said(tmp_path: Path, file: str) -> None:
    cache = DiskCache(tmp_path, 10**9)
    cache.add("one", writes("hello"), {})
    raw = bytearray((tmp_path / "one" / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "one" / file).write_bytes(raw)
    damaged: list[Path] = []

    assert cache.find("one", on_damage=damaged.append) is None
    assert damaged == [tmp_path / "one"]
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**9)
    threads = [threading.Thread(target=cache.add, args=("one", writes("x" * 10_000), {})) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert cache.find("one", on_damage=never) is not None


KILLED = """
import sys, time
from pathlib import Path
from finetune.core.disk_cache import DiskCache
def fill(directory):
    (directory / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
DiskCache(Path(sys.argv[1]), 10**9).add("one", fill, {})
"""


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**9)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        cache.add("other", writes("a"), {})
        assert len(list(tmp_path.iterdir())) == 2  # it still writes, so nobody deletes what it has
        writer.send_signal(signal.SIGKILL)
    [left] = [path for path in tmp_path.iterdir() if path.name != "other"]
    os.utime(left, (time.time() - 3600,) * 2)
    DiskCache(tmp_path, 10**9).add("third", writes("b"), {})  # as the next process does

    assert cache.find("one", on_damage=never) is None
    assert {path.name for path in tmp_path.iterdir()} == {"other", "third"}


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        (directory / "part").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        DiskCache(tmp_path, 10**9).add("one", fails, {})
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 250)
    for age, name in ((30, "oldest"), (20, "used"), (10, "young")):
        cache.add(name, writes("x" * 80), {})
        stamp = time.time() - age
        os.utime(tmp_path / name / "entry.json", (stamp, stamp))
    cache.find("oldest", on_damage=never)
    cache.add("new", writes("x" * 80), {})

    assert {entry.path.name for entry in cache.entries()} == {"oldest", "young", "new"}


def test_many_entries_are_not_counted_again_for_each_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, counted = DiskCache(tmp_path, 16_000), []
    monkeypatch.setattr(cache, "entries", lambda: counted.append(1) or DiskCache(tmp_path, 0).entries())
    for number in range(200):
        cache.add(str(number), writes("x" * 100), {})

    assert len(counted) < 60
    assert sum(entry.bytes for entry in DiskCache(tmp_path, 0).entries()) <= 16_000


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE_GB", "much")
    with pytest.raises(UsageError, match="FT_CACHE_GB=much"):
        cache_limit()

"""Entries of the token cache are whole or do not count; damage is found and mended."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.core.errors import DataError
from finetune.data.token_cache import TokenCache
from finetune.data.token_store import (
    IDS_FILE,
    MASK_FILE,
    ROW,
    TABLE_FILE,
    DamagedStoreError,
    DirectoryWriter,
    MemoryWriter,
    StoreWriter,
    checksum,
)

KEY = "0123abcd"
ROWS = [np.arange(3, 3 + length, dtype=np.uint16) for length in (5, 1, 40)]


def add_rows(writer: StoreWriter, rows=ROWS) -> None:
    """Each row as a part of its own; the second half is trained on."""
    for number, ids in enumerate(rows):
        mask = np.arange(len(ids)) >= len(ids) // 2
        table = np.zeros(1, ROW)
        table["length"], table["line"], table["checksum"] = len(ids), number + 1, checksum(ids, mask)
        writer.add(table, ids, mask)


def cache_in(folder: Path, limit: int = 10**9) -> TokenCache:
    return TokenCache(folder / "tokens", limit)


def written(cache: TokenCache, key: str = KEY) -> Path:
    with cache.writing(key) as unfinished:
        add_rows(unfinished.writer)
        unfinished.publish("<u2", {"rows": 3})
    return cache.root / key


def ids_of(store) -> list[list[int]]:
    return [store.row(n, 100, "f").input_ids.tolist() for n in range(len(store))]


def test_rows_come_back_as_they_were_written_from_memory_and_from_disk(tmp_path):
    cache = cache_in(tmp_path)
    written(cache)
    memory = MemoryWriter()
    add_rows(memory)
    entry = cache.find(KEY)

    assert entry is not None
    assert entry.facts == {"rows": 3}
    assert ids_of(entry.store) == ids_of(memory.finish()) == [row.tolist() for row in ROWS]
    row = entry.store.row(2, 10, "f")
    assert (len(row), row.truncated, row.input_ids.dtype) == (10, True, np.int32)


@pytest.mark.parametrize("name", [TABLE_FILE, IDS_FILE, MASK_FILE, "entry.json"])
def test_a_shortened_file_is_no_entry_and_is_deleted(tmp_path, name):
    cache = cache_in(tmp_path)
    file = written(cache) / name
    os.truncate(file, file.stat().st_size - 1)

    assert cache.find(KEY) is None
    assert not (cache.root / KEY).exists()


@pytest.mark.parametrize("name", [TABLE_FILE, IDS_FILE, MASK_FILE, "entry.json"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_flipped_bit_is_found_when_the_entry_is_opened_or_the_row_is_read(tmp_path, name, share):
    cache = cache_in(tmp_path)
    file = written(cache) / name
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)
    entry = cache.find(KEY)

    if entry is not None:
        with pytest.raises(DamagedStoreError, match=r"are damaged\. Delete that directory and start again"):
            ids_of(entry.store)


def test_an_entry_that_is_written_counts_only_when_it_is_published(tmp_path):
    cache = cache_in(tmp_path)
    with cache.writing(KEY) as unfinished:
        add_rows(unfinished.writer)
        assert cache.find(KEY) is None

    assert list(cache.root.iterdir()) == []


WRITER = """
import os, signal, sys
from pathlib import Path
from tests.unit.data.test_token_cache import KEY, add_rows, cache_in
with cache_in(Path(sys.argv[1])).writing(KEY) as unfinished:
    add_rows(unfinished.writer)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_goes_with_the_next(tmp_path):
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], cwd=root, check=False, capture_output=True)
    cache = cache_in(tmp_path)

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert cache.find(KEY) is None
    assert len(list(cache.root.iterdir())) == 1
    written(cache)
    assert [place.name for place in cache.root.iterdir()] == [KEY]


def test_two_writers_of_one_entry_do_not_meet(tmp_path):
    cache = cache_in(tmp_path)
    with cache.writing(KEY) as first, cache.writing(KEY) as second:
        for unfinished in (first, second):
            add_rows(unfinished.writer)
        entries = [unfinished.publish("<u2", {"rows": 3}) for unfinished in (first, second)]

    assert [ids_of(entry.store) for entry in entries] == [[row.tolist() for row in ROWS]] * 2
    assert [place.name for place in cache.root.iterdir()] == [KEY]


def test_the_entry_that_was_not_used_for_longest_goes_first(tmp_path):
    sizes = [file.stat().st_size for file in written(cache_in(tmp_path / "one")).glob("*.bin")]
    cache = cache_in(tmp_path / "all", limit=int(2.5 * sum(sizes)))
    for age, key in ((300, "a"), (200, "b")):
        os.utime(written(cache, key) / "entry.json", (10**9 - age, 10**9 - age))
    assert cache.find("a") is not None  # used again
    written(cache, "c")

    assert sorted(place.name for place in cache.root.iterdir()) == ["a", "c"]


def test_a_full_disk_is_said_with_the_way_out(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DirectoryWriter, "add", full)
    cache = cache_in(tmp_path)
    with pytest.raises(DataError, match=r"No space left on device.*FT_CACHE_DIR"):
        written(cache)
    assert list(cache.root.iterdir()) == []

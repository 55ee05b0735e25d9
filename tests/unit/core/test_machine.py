"""What a process may use, by the control groups that it is in."""

import sys
from pathlib import Path

import pytest

from finetune.core import machine

LIMIT, USED = 700_000_000, 200_000_000
PAGE = 4096

# As Linux 6 writes it; only the numbers are made up.
STAT_OF_V2 = """anon 90000000
file 95000000
kernel 15000000
kernel_stack 65536
pagetables 2000000
shmem 4096
file_mapped 20000000
file_dirty 1000000
file_writeback 500000
inactive_anon 90000000
active_anon 0
inactive_file 60000000
active_file 35000000
unevictable 0
slab_reclaimable 7000000
slab_unreclaimable 3000000
workingset_refault_file 12
pgfault 90210
"""
STAT_OF_V1 = """cache 1
rss 2
mapped_file 3
dirty 4
inactive_file 5
active_file 6
hierarchical_memory_limit 700000000
total_cache 95000000
total_rss 90000000
total_mapped_file 20000000
total_dirty 1000000
total_writeback 500000
total_inactive_anon 90000000
total_active_anon 0
total_inactive_file 60000000
total_active_file 35000000
total_unevictable 0
"""
FILES = 60_000_000 + 35_000_000 - 20_000_000 - 1_000_000 - 500_000


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


def test_a_group_around_the_own_one_limits_it_too(groups: Path) -> None:
    put(groups, {
        "own": "0::/user/run\n",
        "cgroup/user/memory.max": str(LIMIT), "cgroup/user/memory.current": str(USED),
        "cgroup/user/run/memory.max": "max", "cgroup/user/run/memory.current": "1",
    })  # fmt: skip
    assert machine.memory_limit() == LIMIT
    assert machine.free_memory() == LIMIT - USED


def test_the_tightest_of_nested_groups_counts_with_what_it_holds_itself(groups: Path) -> None:
    put(groups, {
        "own": "0::/pod/container\n",
        "cgroup/pod/memory.max": str(LIMIT), "cgroup/pod/memory.current": str(LIMIT - PAGE),  # neighbours fill it
        "cgroup/pod/container/memory.max": str(LIMIT - 1), "cgroup/pod/container/memory.current": str(USED),
    })  # fmt: skip
    assert machine.free_memory() == PAGE
    put(groups, {"cgroup/pod/memory.current": str(USED + PAGE)})
    assert machine.free_memory() == LIMIT - USED - PAGE


def test_of_files_in_memory_those_are_free_that_nobody_uses_and_the_disk_has(groups: Path) -> None:
    put(groups, {
        "own": "0::/\n", "cgroup/memory.max": str(LIMIT), "cgroup/memory.current": str(USED),
        "cgroup/memory.stat": STAT_OF_V2,
    })  # fmt: skip
    assert machine.free_memory() == LIMIT - USED + FILES + 7_000_000  # with the kernel's notes on files


def test_where_a_group_is_held_up_is_a_limit_as_well_as_where_it_is_ended(groups: Path) -> None:
    high = LIMIT // 2
    put(groups, {
        "own": "0::/\n", "cgroup/memory.max": str(LIMIT), "cgroup/memory.high": str(high),
        "cgroup/memory.current": str(USED),
    })  # fmt: skip
    assert machine.memory_limit() == high
    assert machine.free_memory() == high - USED
    put(groups, {"cgroup/memory.max": "max"})
    assert machine.memory_limit() == high


def test_version_1_is_read_where_it_is_mounted_with_the_groups_below(groups: Path) -> None:
    put(groups, {
        "own": "9:name=systemd:/\n4:memory:/on/the/host\n0::/\n",
        "cgroup/memory/memory.limit_in_bytes": str(LIMIT), "cgroup/memory/memory.usage_in_bytes": str(USED),
        "cgroup/memory/memory.stat": STAT_OF_V1,
    })  # fmt: skip
    assert machine.free_memory() == LIMIT - USED + FILES


def test_a_group_beyond_its_limit_has_nothing_free(groups: Path) -> None:
    put(groups, {"own": "0::/\n", "cgroup/memory.max": str(USED), "cgroup/memory.current": str(LIMIT)})
    assert machine.free_memory() == 0


def test_without_groups_there_is_no_limit(groups: Path) -> None:
    assert machine.memory_limit() is None
    assert machine.free_memory() > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from Linux's /proc")
def test_what_a_process_shares_is_not_its_own() -> None:
    status = Path("/proc/self/status").read_text()
    anonymous = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    assert machine.own_memory() == pytest.approx(anonymous, rel=0.05)
    assert machine.own_memory() < machine.resident_memory()

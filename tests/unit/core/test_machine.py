"""What a process may use, by the control groups that it is in."""

from pathlib import Path

import pytest

from finetune.core import machine

LIMIT, USED = 700_000_000, 200_000_000


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


def test_version_1_is_read_where_it_is_mounted_and_files_in_memory_are_free(groups: Path) -> None:
    put(groups, {
        "own": "9:name=systemd:/\n4:memory:/on/the/host\n0::/\n",
        "cgroup/memory/memory.limit_in_bytes": str(LIMIT), "cgroup/memory/memory.usage_in_bytes": str(USED),
        "cgroup/memory/memory.stat": "cache 9\ntotal_inactive_file 50000000\n",
    })  # fmt: skip
    assert machine.free_memory() == LIMIT - USED + 50_000_000


def test_without_groups_there_is_no_limit(groups: Path) -> None:
    assert machine.memory_limit() is None
    assert machine.free_memory() > 0

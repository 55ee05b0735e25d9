"""Arrays on the disk and work in windows give what arrays in memory would."""

import errno
import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.data.test_large_data import DEMO

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError
from finetune.data import columns, doctoring, near, partition, stored_rows, token_store
from finetune.data.columns import at, pieces_of, release, row_array, shuffled, stored, where
from finetune.data.partition import Partition
from finetune.data.prepare import prepare_data
from finetune.data.tokenizer import TextTokenizer
from finetune.workflows.check_data import check_data

VALUES = np.random.default_rng(0).integers(0, 1_000, 300)


@pytest.fixture(params=["memory", "disk"])
def _place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    if request.param == "disk":
        in_tiny_windows(monkeypatch)


def in_tiny_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large: seven rows at once, and no array in memory."""
    monkeypatch.setattr(columns, "_IN_MEMORY", 0)
    for module in (columns, token_store):
        monkeypatch.setattr(module, "WINDOW", 7)
    for texts in (near, doctoring, stored_rows):
        monkeypatch.setattr(texts, "TEXTS", 7)
    monkeypatch.setattr(partition, "_PART", 300)


@pytest.mark.usefixtures("_place")
def test_arrays_keep_what_is_put_into_them() -> None:
    kept = stored(np.split(VALUES, [3, 3, 90]), np.int64)
    changed = row_array(len(VALUES), np.int64)
    changed[:] = kept
    changed[5] += 1
    release(kept, changed)

    assert np.array_equal(kept, VALUES)
    assert np.array_equal(np.concatenate(list(pieces_of(kept))), VALUES)
    assert changed[5] == VALUES[5] + 1
    assert np.array_equal(where(VALUES, lambda part: part > 500), np.flatnonzero(VALUES > 500))
    assert np.array_equal(at(kept, VALUES % 300), VALUES[VALUES % 300])
    assert len(stored([], np.int64)) == 0


@pytest.mark.usefixtures("_place")
def test_an_order_is_that_of_numpys_permutation() -> None:
    order = shuffled(1_000, np.random.Generator(np.random.PCG64([3, 1])))
    assert np.array_equal(order, np.random.Generator(np.random.PCG64([3, 1])).permutation(1_000))


@pytest.mark.usefixtures("_place")
def test_records_with_equal_keys_meet_in_one_part_and_parts_follow_the_keys() -> None:
    records = np.zeros(len(VALUES), [("key", "<u8", (1,)), ("row", "<i8")])
    records["key"][:, 0] = VALUES.astype(np.uint64) << np.uint64(54)
    records["row"] = np.arange(len(VALUES))
    parts = list(Partition(lambda: pieces_of(records), len(records), records.dtype))
    together = np.concatenate(parts)

    assert sorted(together["row"].tolist()) == list(range(len(VALUES)))
    keys = [set(part["key"][:, 0].tolist()) for part in parts if len(part)]
    assert all(max(before) < min(after) for before, after in pairwise(keys))
    assert all((np.diff(part["row"]) > 0).all() for part in parts)


def test_a_full_disk_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match=r"No space left on device.*FT_CACHE_DIR"):
        row_array(2**20, np.int64)


def mixed_rows(folder: Path) -> list[dict[str, Any]]:
    """Two files with copies, labels, conflicts, near copies and a bad row, of weights that are no whole numbers."""
    rng = random.Random(0)
    for name in "ab":
        rows = []
        for _ in range(150):
            words = rng.choices(list("0123"), k=3) if rng.random() < 0.5 else [*"a long and equal text", name]
            row: dict[str, Any] = {"prompt": " ".join(words), "completion": "yes " * rng.randrange(1, 12)}
            rows.append(row | ({"label": rng.random() < 0.7} if name == "b" else {}))
        rows[17]["prompt"] = 7
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [{"path": str(folder / "a.jsonl"), "weight": 0.37}, {"path": str(folder / "b.jsonl"), "weight": 2.5}]


def outcome(files: list[dict[str, Any]], options: dict[str, Any]) -> list[Any]:
    config = DataConfig(train_file=files, **options)
    data = prepare_data(config, tokenizer=TextTokenizer.open(DEMO / "model"), context_length=None, seed=5, samples=4)
    left_out, checks = [str(row) for row in data.left_out], check_data(files[1]["path"], validation=files[0]["path"])
    return [data.fingerprints, data.report, data.notices, data.samples, left_out, data.train_lengths.tolist(), checks]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 24, "on_long": "drop", "include_undesirable": True, "validation_split": 0.4},
        {"max_length": 24, "on_long": "truncate", "validation_file": "b.jsonl"},
    ],
    ids=["split", "dropped", "two files"],
)
def test_the_size_of_a_window_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    files = mixed_rows(tmp_path)
    if "validation_file" in options:
        options = {**options, "validation_file": str(tmp_path / options["validation_file"])}
    whole = outcome(files, options)
    in_tiny_windows(monkeypatch)

    assert outcome(files, options) == whole

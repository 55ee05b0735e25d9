"""A base that MLX quantises on loading is the same, bit for bit, whether it is packed now or read from the cache."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tests.support.in_process import ft_here
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import write_rows

from finetune.config.schema import ModelConfig
from finetune.engines.mlx.loading import BaseModel, load_base
from finetune.models import conversions

REUSED = "are those that an earlier run made"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model, for which the cache is used all the same."""
    monkeypatch.setattr(conversions, "LEAST_BYTES", 0)
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    return write_tiny_model(tmp_path / "model")


def load(model: Path, bits: str = "4bit") -> BaseModel:
    return load_base(model, ModelConfig(name=str(model), quantization=bits))


def entries(model: Path) -> list[Path]:
    return sorted((model.parent / "cache" / "conversions").glob("*"))


def require_same(one: BaseModel, other: BaseModel) -> None:
    first, second = (dict(tree_flatten(base.model.parameters())) for base in (one, other))
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        assert mx.array_equal(array, second[name]), name


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_weights_are_those_of_the_first_time(model: Path, bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE_GB", "0")
    plain = load(model, bits)
    assert entries(model) == []
    monkeypatch.delenv("FT_CACHE_GB")
    first, second = load(model, bits), load(model, bits)

    assert not any(REUSED in notice for notice in first.notices)
    assert any(REUSED in notice for notice in second.notices)
    require_same(plain, first)
    require_same(plain, second)


def test_a_run_walks_the_same_steps(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    weights = []
    for number in range(2):
        run = tmp_path / f"run-{number}"
        sets = ("--max-steps", 3, "--backend", "mlx", "--quantization", "4bit", "--set", "lora.rank=4")
        ran = ft_here("train", "start", model, tmp_path / "rows.jsonl", "--output", run, *sets)
        assert ran.code == 0, ran.err
        assert (REUSED in ran.out + ran.err) == bool(number)
        weights.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_each_width_and_each_change_of_a_file_has_its_own_entry(model: Path) -> None:
    load(model, "4bit")
    load(model, "8bit")
    assert len(entries(model)) == 2
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    status = file.stat()
    file.write_bytes(raw)
    shutil.os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nobody had touched it

    assert not any(REUSED in notice for notice in load(model, "4bit").notices)
    assert len(entries(model)) == 3


def test_a_damaged_entry_is_made_again(model: Path) -> None:
    expected = load(model)
    [entry] = entries(model)
    raw = bytearray((entry / "packed.safetensors").read_bytes())
    raw[-5] ^= 16
    (entry / "packed.safetensors").write_bytes(raw)
    again = load(model)

    assert any("were damaged and are made again" in notice for notice in again.notices)
    require_same(expected, again)
    assert any(REUSED in notice for notice in load(model).notices)


def test_an_entry_may_go_while_it_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(model)
    read = mx.load

    def then_gone(path: str):
        arrays = read(path)
        if "conversions" in path:
            shutil.rmtree(Path(path).parent)
        return arrays

    monkeypatch.setattr(mx, "load", then_gone)
    require_same(expected, load(model))


def test_without_room_the_run_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 10

    monkeypatch.setattr(conversions.shutil, "disk_usage", lambda _: Full)
    base = load(model)

    assert any("are not kept: there is too little room" in notice for notice in base.notices)
    assert entries(model) == []


def test_a_cache_that_cannot_be_written_does_no_harm(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "cache").write_text("a file where the directory should be")
    assert any("cannot be kept in" in notice for notice in load(model).notices)

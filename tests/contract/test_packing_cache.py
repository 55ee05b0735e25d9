"""A base that is quantised on loading is the same, bit for bit, whether it is packed now or read from the cache."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from tests.support.in_process import ft_here
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_models import make_model
from tests.support.tiny_run import write_rows

from finetune.config.schema import ModelConfig
from finetune.engines.base import Engine
from finetune.engines.mlx import loading as mlx_loading
from finetune.engines.registry import choose_engine
from finetune.engines.torch import loading as torch_loading
from finetune.engines.torch import packing_cache
from finetune.models import conversions
from finetune.models.conversions import Conversion

REUSED = "are those that an earlier run made"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model, for which the cache is used all the same."""
    monkeypatch.setattr(conversions, "LEAST_BYTES", 0)
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    return write_tiny_model(tmp_path / "model")


@dataclass(frozen=True)
class Loaded:
    """Every array of a base, as bytes, and what loading said."""

    arrays: dict[str, bytes]
    notices: tuple[str, ...]

    @property
    def reused(self) -> bool:
        return any(REUSED in notice for notice in self.notices)


def load(engine: Engine, model: Path, bits: str = "4bit") -> Loaded:
    config = ModelConfig(name=str(model), quantization=bits)
    if engine.name == "mlx":
        base = mlx_loading.load_base(model, config)
        found = {name: np.asarray(array) for name, array in tree_flatten(base.model.parameters())}
        return Loaded({name: array.tobytes() for name, array in found.items()}, base.notices)
    base = torch_loading.load_base(model, config)
    tensors = {**dict(base.model.named_parameters()), **dict(base.model.named_buffers())}
    flat = {name: tensor.detach().contiguous().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
    assert any("codes" in name for name in flat)
    return Loaded({name: tensor.numpy().tobytes() for name, tensor in flat.items()}, base.notices)


def entries(model: Path) -> list[Path]:
    return sorted((model.parent / "cache" / "conversions").glob("*"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_weights_are_those_of_the_first_time(
    engine: Engine, model: Path, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_CACHE_GB", "0")
    plain = load(engine, model, bits)
    assert entries(model) == []
    monkeypatch.delenv("FT_CACHE_GB")
    first, second = load(engine, model, bits), load(engine, model, bits)

    assert (plain.reused, first.reused, second.reused) == (False, False, True)
    assert plain.arrays == first.arrays
    assert plain.arrays == second.arrays


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_biases_and_turned_matrices_are_kept_as_well(engine: Engine, model: Path, family: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / family, family)
    first, second = load(engine, other), load(engine, other)
    assert second.reused
    assert first.arrays == second.arrays


def test_a_run_walks_the_same_steps(engine: Engine, model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    weights = []
    for number in range(2):
        run = tmp_path / f"run-{number}"
        sets = ("--max-steps", 3, "--backend", engine.name, "--quantization", "4bit", "--set", "lora.rank=4")
        ran = ft_here("train", "start", model, tmp_path / "rows.jsonl", "--output", run, *sets)
        assert ran.code == 0, ran.err
        assert (REUSED in ran.out + ran.err) == bool(number)
        weights.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_each_engine_each_width_and_each_change_of_a_file_has_its_own_entry(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    load(engine, model, "4bit")
    load(engine, model, "8bit")
    assert len(entries(model)) == 2
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    status = file.stat()
    file.write_bytes(raw)
    shutil.os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nobody had touched it

    assert not load(engine, model, "4bit").reused
    assert len(entries(model)) == 3
    for name in ("mlx", "pytorch"):
        load(choose_engine(ModelConfig(name=str(model), backend=name)), model, "4bit")
    assert len(entries(model)) == 4


def test_a_damaged_entry_is_made_again(engine: Engine, model: Path) -> None:
    expected = load(engine, model)
    [entry] = entries(model)
    raw = bytearray((entry / "packed.safetensors").read_bytes())
    raw[-5] ^= 16
    (entry / "packed.safetensors").write_bytes(raw)
    again = load(engine, model)

    assert any("were damaged and are made again" in notice for notice in again.notices)
    assert expected.arrays == again.arrays
    assert load(engine, model).reused


def test_an_entry_may_go_while_it_is_read(engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(engine, model)
    read = mx.load if engine.name == "mlx" else packing_cache.read_packed

    def then_gone(path: str | Path):
        arrays = read(path)
        if "conversions" in str(path):
            shutil.rmtree(Path(path).parent)
        return arrays

    monkeypatch.setattr(mx, "load", then_gone)
    monkeypatch.setattr(packing_cache, "read_packed", then_gone)
    again = load(engine, model)
    assert again.reused
    assert expected.arrays == again.arrays


def test_an_entry_may_go_just_before_it_is_read(engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(engine, model)
    find = Conversion.find

    def then_gone(self: Conversion, say: Callable[[str], None]) -> Path | None:
        found = find(self, say)
        shutil.rmtree(found)
        return found

    monkeypatch.setattr(Conversion, "find", then_gone)
    again = load(engine, model)
    assert not again.reused
    assert expected.arrays == again.arrays


def test_without_room_the_run_goes_on(engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 10

    monkeypatch.setattr(conversions.shutil, "disk_usage", lambda _: Full)
    base = load(engine, model)

    assert any("are not kept: there is too little room" in notice for notice in base.notices)
    assert entries(model) == []


def test_a_cache_that_cannot_be_written_does_no_harm(engine: Engine, model: Path) -> None:
    (model.parent / "cache").write_text("a file where the directory should be")
    assert any("cannot be kept in" in notice for notice in load(engine, model).notices)

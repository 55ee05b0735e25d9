"""Ours to PEFT's files and back, ours to mlx-lm's and back: every bit of every tensor, and the scale exactly."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tests.unit.adapters.samples import MODULES, plain_adapter, same_updates

from finetune.adapters.adapter import Adapter
from finetune.adapters.lora import alpha_for
from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.one_scale import made_uniform
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import read_adapter

RANKS = st.integers(1, 12)
ALPHAS = st.one_of(st.integers(1, 128).map(float), st.floats(0.01, 1000.0))
ADAPTERS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "ranks": st.tuples(RANKS, RANKS),
        "alpha": ALPHAS,
        "use_rslora": st.booleans(),
        "dora": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.1]),
    }
)


@settings(max_examples=60)
@given(values=ADAPTERS, alphas=st.dictionaries(st.sampled_from(["q_proj", MODULES[1]]), ALPHAS))
def test_peft_files_keep_every_bit(values: dict[str, Any], alphas: dict[str, float]) -> None:
    written = plain_adapter(**values, alpha_pattern=alphas)
    with tempfile.TemporaryDirectory() as directory:
        write_adapter(Path(directory), written)
        found = read_adapter(Path(directory))
    same_updates(found, written)
    assert found.config == written.config


@settings(max_examples=60)
@given(values=ADAPTERS, power=st.integers(-3, 3))
def test_mlx_lm_files_keep_every_bit_where_scales_differ_by_powers_of_two(values: dict[str, Any], power: int) -> None:
    first, second = values["ranks"]
    share = math.sqrt(second / first) if values["use_rslora"] else second / first
    written = plain_adapter(**values, alpha_pattern={MODULES[1]: values["alpha"] * share * 2.0**power})
    if not _is_power_of_two(written.scale(MODULES[0]) / written.scale(MODULES[1])):
        return  # the last bit of a quotient: the next test is about those
    with tempfile.TemporaryDirectory() as directory:
        assert "rounded" not in " ".join(write_mlx_lm(Path(directory), written, layers=2))
        found = read_adapter(Path(directory))
    same_updates(found, written)
    assert found.config == written.config


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5


@settings(max_examples=60)
@given(values=ADAPTERS, alpha=ALPHAS)
def test_what_mlx_lm_computes_is_the_same_for_all_ranks_and_scales(values: dict[str, Any], alpha: float) -> None:
    """The product as mlx-lm forms it, by its file alone: one scale, one rank, x A then B.

    B is rounded once where the ratio of the scales is no power of two: 2^-24, and the sum over the rank likewise.
    """
    written = plain_adapter(**values, alpha_pattern={MODULES[1]: alpha})
    with tempfile.TemporaryDirectory() as directory:
        write_mlx_lm(Path(directory), written, layers=2)
        tensors = load_file(Path(directory) / "adapters.safetensors")
        parameters = json.loads((Path(directory) / "adapter_config.json").read_text())["lora_parameters"]
    for module, update in written.updates.items():
        a, b = (tensors[f"{module}.lora_{name}"].astype(np.float64) for name in "ab")
        assert a.shape[1] == parameters["rank"]
        expected = written.scale(module) * update.b.astype(np.float64) @ update.a
        size = abs(written.scale(module)) * np.abs(update.b) @ np.abs(update.a)
        assert (np.abs(parameters["scale"] * (a @ b).T - expected) <= 2.0**-23 * size).all()


def test_a_file_that_was_changed_by_hand_is_read_as_mlx_lm_reads_it(tmp_path: Path) -> None:
    write_mlx_lm(tmp_path, plain_adapter(ranks=(4, 2)), layers=2)
    path = tmp_path / "adapter_config.json"
    document = json.loads(path.read_text())
    document["lora_parameters"]["scale"] = 5.0
    path.write_text(json.dumps(document))
    found = read_adapter(tmp_path)
    assert [found.scale(module) for module in MODULES] == [5.0, 5.0]
    assert [found.updates[module].rank for module in MODULES] == [4, 4]


def test_the_most_common_scale_is_written_and_the_rest_goes_into_b() -> None:
    adapter = plain_adapter(alpha_pattern={MODULES[1]: 32.0})
    three = Adapter(adapter.config, {**adapter.updates, "model.layers.2.mlp.up_proj": adapter.updates[MODULES[1]]})
    uniform = made_uniform(three)
    assert (uniform.rank, uniform.scale, uniform.rounded) == (4, 2.0, ())
    np.testing.assert_array_equal(uniform.updates[MODULES[1]].b, three.updates[MODULES[1]].b * 4)


@given(scale=st.floats(1e-3, 1e3), rank=st.integers(1, 512))
def test_the_alpha_of_a_scale_gives_the_scale_back(scale: float, rank: int) -> None:
    """To the last bit of a double; exactly for ranks that are powers of two, and for short decimals."""
    assert alpha_for(scale, rank) / rank == pytest.approx(scale, rel=2.0**-52)
    assert np.float32(alpha_for(scale, rank) / rank) == pytest.approx(np.float32(scale), rel=2.0**-23)
    if _is_power_of_two(rank):
        assert alpha_for(scale, rank) / rank == scale
    for short in (20.0, 10.0, 2.0, 0.1, 0.3, 1.5):
        assert alpha_for(short, rank) / rank == pytest.approx(short, rel=2.0**-52)

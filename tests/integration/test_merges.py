"""Merges through `ft export`: what survives is reported, and what does not survive is not written."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.in_process import ft_here as ft
from tests.support.quantised import quantise
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model
from tests.support.tiny_run import write_rows

import finetune
from finetune.engines.base import Engine

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return quantise(model, tmp_path_factory.mktemp("models") / "four-bit")


def adapter_of(base: Path, destination: Path, *, strength: float) -> Path:
    """An adapter whose B is multiplied by `strength`; 1 changes every answer."""
    write_tiny_adapter(destination, base=str(base))
    tensors = load_file(destination / WEIGHTS)
    scaled = {name: array * np.float32(strength if "lora_B" in name else 1) for name, array in tensors.items()}
    save_file(scaled, destination / WEIGHTS)
    return destination


def test_a_merge_that_loses_the_adapter_is_refused_with_the_ways_out(quantised: Path, tmp_path: Path) -> None:
    """Steps of four bits are far larger than this adapter's changes."""
    adapter = adapter_of(quantised, tmp_path / "weak", strength=0.02)
    ran = ft("export", adapter, "--format", "merged", "--output", tmp_path / "out")
    assert ran.code == 1
    for part in ("does not survive this merge", "nats a token", "At most 25%", "--dequantize", "--format peft or mlx"):
        assert part in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["weak"]
    ran = ft("export", adapter, "--format", "merged", "--dequantize", "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["comparison"]["divergence"]["exported"] < 1e-6
    assert not any(name.endswith(".scales") for name in load_file(tmp_path / "out/model.safetensors"))


def test_a_merge_that_keeps_the_adapter_says_how_much(quantised: Path, tmp_path: Path) -> None:
    adapter = adapter_of(quantised, tmp_path / "strong", strength=1.0)
    ran = ft("export", adapter, "--format", "merged", "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    comparison = ran.json["comparison"]
    assert comparison["tolerance"] is None
    assert 0 < comparison["divergence"]["exported"] < 0.25 * comparison["divergence"]["base"]
    assert any(name.endswith(".scales") for name in load_file(tmp_path / "out/model.safetensors"))
    assert "nats a token, where the untuned base has" in (tmp_path / "out/README.md").read_text()


def test_a_plain_merge_shows_the_same_figures(engine: Engine, model: Path, tmp_path: Path) -> None:
    adapter = adapter_of(model, tmp_path / "strong", strength=1.0)
    ran = ft("export", adapter, "--format", "merged", "--backend", engine.name, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "KL divergence from the tuned model" in ran.out
    assert "where the untuned base has" in ran.out


def test_an_adapter_trained_on_a_base_quantised_on_loading_is_merged_as_a_float_model(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    """What the adapter was trained beside, the quantised values, is in the merged files."""
    run = tmp_path / "run"
    finetune.train(
        {
            "model": {"name": str(model), "backend": engine.name, "quantization": "4bit", "dtype": "float32"},
            "lora": {"rank": 4},
            "training": {"max_steps": 4, "learning_rate": 0.02},
            "data": {"train_file": str(write_rows(tmp_path / "rows.jsonl")), "validation_split": 0.3},
            "output": {"output_dir": str(run), "sample_prompts": 0},
        }
    )
    ran = ft("export", run, "--format", "merged", "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["comparison"]["tolerance"] == 1e-4
    weights = load_file(tmp_path / "out/model.safetensors")
    original = load_file(model / "model.safetensors")
    assert weights.keys() == original.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(weights[name] - original[name]).max() > 1e-3

"""`ft export` between PEFT and mlx-lm, as a person uses it: old files, no base at hand, checkpoints, DoRA."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.support.in_process import ft_here as ft
from tests.support.tiny_adapters import adapt
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model

from finetune.adapters.store import read_adapter
from finetune.engines.base import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def old_npz(directory: Path, adapter: Path) -> Path:
    """What mlx-examples wrote: matrices transposed, no configuration."""
    directory.mkdir()
    tensors = {}
    for module, update in read_adapter(adapter).updates.items():
        tensors |= {f"{module}.lora_a": update.a.T, f"{module}.lora_b": update.b.T}
    np.savez(directory / "adapters.npz", **tensors)
    return directory / "adapters.npz"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_to_mlx_and_back_keeps_every_bit(engine: Engine, model: Path, tmp_path: Path, method: str) -> None:
    options = {"rank_pattern": {"up_proj": 8}, "alpha": 6.0}
    adapter = adapt(engine, model, tmp_path / "adapter", method=method, **options)
    for source, format in ((adapter, "mlx"), (tmp_path / "mlx", "peft")):
        ran = ft("export", source, "--model", model, "--format", format, "--output", tmp_path / format, "--json")
        assert ran.code == 0, ran.err
        assert ran.json["comparison"]["largest_difference"] < 1e-4
        assert ran.json["comparison"]["divergence"]["exported"] < 1e-6 < ran.json["comparison"]["divergence"]["base"]
    weights = "adapter_model.safetensors"
    before, after = load_file(adapter / weights), load_file(tmp_path / "peft" / weights)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    first, last = read_adapter(adapter), read_adapter(tmp_path / "peft")
    assert all(first.scale(module) == last.scale(module) for module in first.updates)


def test_an_adapter_is_converted_without_its_base_and_that_is_said(shared: Path, tmp_path: Path) -> None:
    """A real adapter of mlx-lm, whose base is a directory of another machine."""
    real = shared / "adapters/mlx_qwen2.5-0.5b"
    ran = ft("export", real, "--format", "peft", "--output", tmp_path / "peft")
    assert ran.code == 0, ran.err
    assert "is not on this machine: the adapter is converted, and its predictions are not compared" in ran.err
    assert "scale = 10 counts, and alpha = 16 has no effect" in ran.err
    assert "## Not checked" in (tmp_path / "peft/README.md").read_text()
    document = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (document["r"], document["lora_alpha"]) == (8, 80)
    assert len(document["target_modules"]) == 8
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    theirs = load_file(real / "adapters.safetensors")
    assert len(tensors) == len(theirs) == 16
    for name, array in theirs.items():
        key = f"base_model.model.{name.replace('.lora_a', '.lora_A.weight').replace('.lora_b', '.lora_B.weight')}"
        np.testing.assert_array_equal(tensors[key], array.T)
    ran = ft("export", tmp_path / "peft", "--format", "mlx", "--output", tmp_path / "mlx")
    assert ran.code == 0, ran.err
    again = load_file(tmp_path / "mlx/adapters.safetensors")
    assert all(np.array_equal(again[name], array) for name, array in theirs.items())
    parameters = json.loads((tmp_path / "mlx/adapter_config.json").read_text())["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (8, 10.0)


def test_a_checkpoint_of_mlx_lm_is_chosen_by_its_step(shared: Path, tmp_path: Path) -> None:
    real = shared / "adapters/mlx_qwen2.5-0.5b"
    ran = ft("export", real, "--checkpoint", 100, "--format", "peft", "--output", tmp_path / "peft")
    assert ran.code == 0, ran.err
    found = load_file(tmp_path / "peft/adapter_model.safetensors")
    expected = load_file(real / "0000100_adapters.safetensors")
    name = "model.layers.20.self_attn.q_proj"
    np.testing.assert_array_equal(found[f"base_model.model.{name}.lora_B.weight"], expected[f"{name}.lora_b"].T)
    ran = ft("export", real, "--checkpoint", 150, "--format", "peft", "--output", tmp_path / "none")
    assert (ran.code, "There are: 100, 200" in ran.err) == (2, True)


def test_an_npz_is_read_by_every_command_and_its_scale_is_said(model: Path, tmp_path: Path) -> None:
    old = old_npz(tmp_path / "old", write_tiny_adapter(tmp_path / "adapter"))
    ran = ft("export", old, "--model", model, "--format", "peft", "--output", tmp_path / "peft")
    assert ran.code == 0, ran.err
    assert "the scale is taken to be 20" in ran.err
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["lora_alpha"] == 80
    ran = ft("generate", "--model", model, "--adapter", old, "--prompt", "Hello", "--max-tokens", 4)
    assert ran.code == 0, ran.err
    assert "the scale is taken to be 20" in ran.err
    ran = ft("export", old.parent, "--scale", 2, "--format", "mlx", "--output", tmp_path / "mlx")
    assert ran.code == 0, ran.err
    assert "The adapter's files name no base" in ran.err
    assert read_adapter(tmp_path / "mlx").scale("model.layers.0.mlp.up_proj") == 2.0


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--format", "peft", "--dequantize"], 2, "--dequantize has no effect: --format peft merges nothing"),
        (["--format", "merged", "--dequantize"], 2, "is not quantised. Leave it out"),
        (["--format", "peft", "--scale", 3], 1, "PEFT's files say their scale"),
        (["--format", "peft", "--model", "nowhere/at-all"], 1, "nowhere/at-all is neither a directory nor a model"),
    ],
)
def test_options_without_effect_are_refused(
    model: Path, tmp_path: Path, arguments: list[object], code: int, expected: str
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", base=str(model))
    ran = ft("export", adapter, *arguments, "--output", tmp_path / "out")
    assert (ran.code, expected in ran.err) == (code, True), ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_without_a_base_cannot_be_merged(tmp_path: Path) -> None:
    old = old_npz(tmp_path / "old", write_tiny_adapter(tmp_path / "adapter"))
    ran = ft("export", old, "--format", "merged", "--output", tmp_path / "out")
    assert (ran.code, "names no base model. Give it with --model" in ran.err) == (2, True)


def test_every_mismatch_of_another_models_adapter_is_named(model: Path, tmp_path: Path) -> None:
    other = write_tiny_adapter(tmp_path / "other", layers=4)
    ran = ft("export", other, "--model", model, "--format", "peft", "--output", tmp_path / "out")
    assert ran.code == 1
    assert all(f"model.layers.{layer}.mlp.up_proj: the model has no linear module" in ran.err for layer in (2, 3))
    assert not (tmp_path / "out").exists()

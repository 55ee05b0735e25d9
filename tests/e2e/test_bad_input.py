"""What a person may ask for and cannot have, on each engine: one message that says what to do, and nothing written."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.in_process import ft_here
from tests.support.quantised import quantise
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model
from tests.support.tiny_run import write_rows

ENGINES = ("mlx", "pytorch")
on_each_engine = pytest.mark.parametrize("backend", ENGINES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its quantised twin, and rows."""
    folder = tmp_path_factory.mktemp("bad-input")
    write_tiny_model(folder / "model")
    quantise(folder / "model", folder / "quantised")
    write_rows(folder / "rows.jsonl")
    return folder


def refused(folder: Path, backend: str, *overrides: str, model: str = "model", code: int = 2) -> str:
    """What `ft train start` says to these values of the configuration."""
    run = folder / "run"
    values = [f"model.backend={backend}", *overrides]
    sets = [part for value in values for part in ("--set", value)]
    ran = ft_here("train", "start", folder / model, folder / "rows.jsonl", "--output", run, *sets)

    assert ran.code == code, ran.err
    assert not run.exists()
    assert "Traceback" not in ran.err
    assert "fault in finetune" not in ran.err
    return ran.err


def test_bfloat16_on_a_processor_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.engines.torch import compat

    monkeypatch.setattr(compat, "fast_in_bfloat16", lambda _: False)
    said = refused(folder, "pytorch", "model.device=cpu", "model.dtype=bfloat16")

    assert "model.dtype=bfloat16" in said
    assert "model.dtype=float32" in said


@on_each_engine
def test_cuda_on_a_machine_without_it(folder: Path, backend: str) -> None:
    if _cuda():
        pytest.skip("this machine has CUDA")
    said = refused(folder, backend, "model.device=cuda")

    assert "model.device=cuda" in said
    assert "model.device=cpu" in said


def _cuda() -> bool:
    import mlx.core as mx
    import torch

    return torch.cuda.is_available() or mx.cuda.is_available()


@on_each_engine
def test_every_weight_of_a_base_that_is_quantised_on_loading(folder: Path, backend: str) -> None:
    said = refused(folder, backend, "model.quantization=4bit", "training.method=full")

    assert "quantised weights cannot be changed" in said
    assert "Set training.method to lora, or model.quantization to null" in said


@pytest.mark.parametrize("backend", [*ENGINES, "auto"])
def test_every_weight_of_files_that_are_quantised_already(folder: Path, backend: str) -> None:
    said = refused(folder, backend, "training.method=full", model="quantised")

    assert "are quantised (4 bits), so they cannot be changed" in said
    assert "Set training.method to lora" in said


def test_files_that_only_mlx_reads_on_pytorch(folder: Path) -> None:
    said = refused(folder, "pytorch", model="quantised", code=1)

    assert "model.backend=mlx" in said


def test_auto_takes_the_engine_that_reads_the_files(folder: Path, tmp_path: Path) -> None:
    steps = ("--max-steps", 1, "--output", tmp_path / "run")
    ran = ft_here("train", "start", folder / "quantised", folder / "rows.jsonl", *steps)

    assert ran.code == 0, ran.err
    assert "Engine: mlx (auto: the files of this model are quantised for MLX)" in ran.out + ran.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.bits=7", "Did you mean model.quantization?"),
        ("model.quantization=7bit", "7 bits are not offered. Choose 4bit (least memory) or 8bit"),
        ("model.quantization=7", "7 bits are not offered"),
        ("model.quantization=4", "must be one of 4bit, 8bit. Did you mean 4bit?"),
        ("model.quantization=int8", "Did you mean 8bit?"),
        ("training.method=qlora", "QLoRA is training.method: lora with model.quantization: 4bit"),
        ("training.method=rslora", "rsLoRA is training.method: lora with lora.use_rslora: true"),
        ("model.device=mps", "the name for it here is metal"),
        ("model.backend=torch", "Did you mean pytorch?"),
    ],
)
def test_what_other_tools_call_it(folder: Path, override: str, said: str) -> None:
    assert said in refused(folder, "auto", override)


@on_each_engine
def test_target_modules_that_match_nothing(folder: Path, backend: str) -> None:
    said = refused(folder, backend, "lora.target_modules=[query_key_value, q_prj]")

    assert "'query_key_value' matches no linear module" in said
    assert "Did you mean q_proj?" in said
    assert "down_proj, gate_proj, k_proj, " in said


@on_each_engine
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_rank_above_a_layers_width(folder: Path, backend: str, method: str) -> None:
    said = refused(folder, backend, "lora.rank=33", f"training.method={method}")

    assert "lora.rank=33 is more than the width 32 of q_proj" in said
    assert "Choose at most 32" in said


@on_each_engine
def test_an_adapter_for_another_model_with_all_that_does_not_fit(folder: Path, tmp_path: Path, backend: str) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", layers=3)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in weights if "layers.0.mlp.up_proj.lora_A" in key)
    save_file(weights | {name: np.zeros((4, 40), np.float32)}, adapter / "adapter_model.safetensors")
    asked = ("--model", folder / "model", "--adapter", adapter, "--prompt", "Hello", "--backend", backend, "--json")
    ran = ft_here("generate", *asked)
    message = json.loads(ran.out)["error"]["message"]

    assert ran.code == 1
    assert "does not fit the model" in message
    assert "up_proj: adapter 40 -> 48, model 32 -> 48" in message
    assert all(
        f"model.layers.2.{module}: the model has no" in message for module in ("self_attn.q_proj", "mlp.up_proj")
    )


@on_each_engine
def test_a_row_longer_than_the_context_names_the_line_that_asks_for_it(
    folder: Path, tmp_path: Path, backend: str
) -> None:
    config = tmp_path / "long.yml"
    config.write_text("training:\n  max_steps: 1\ndata:\n  max_length: 512\n")
    where = ("--config", config, "--backend", backend, "--output", tmp_path / "run")
    ran = ft_here("train", "start", folder / "model", folder / "rows.jsonl", *where)

    assert ran.code == 2
    assert "data.max_length=512 (long.yml:4) is more than the model's 256. Lower it" in ran.err

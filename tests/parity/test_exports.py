"""Exports in the hands of the programs that they are for: PEFT, transformers and mlx-lm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model
from tests.support.tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

# PEFT asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

WEIGHTS = "model.safetensors"
GELU = 2e-3  # mlx-lm computes the exact form where Gemma has the tanh form
IDS = np.array([[256, 10, 20, 30, 40, 50, 60, 70]])
# float32 in three libraries with their own order of additions; logits here are of size 10.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny", base=str(model))


@pytest.fixture(scope="module")
def peft_logits(model: Path, adapter: Path) -> np.ndarray:
    """PEFT on the adapter that is exported: the reference."""
    return torch_logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter))


def torch_logits(model: torch.nn.Module, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor(ids)).logits.float().numpy())


def export(adapter: Path, format: str, output: Path) -> Path:
    ran = ft("export", adapter, "--format", format, "--output", output, "--json")
    assert ran.code == 0, ran.err
    comparison = ran.json["comparison"]
    assert comparison["largest_difference"] <= comparison["tolerance"] < comparison["adapter_effect"]
    assert "README.md" in ran.json["files"]
    return output


def test_a_peft_export_gives_the_same_logits_in_peft(
    model: Path, adapter: Path, peft_logits: np.ndarray, tmp_path: Path
) -> None:
    exported = export(adapter, "peft", tmp_path / "out")
    base = json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == model
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    np.testing.assert_allclose(torch_logits(loaded), peft_logits, rtol=0, atol=0)


def test_a_merged_export_gives_the_same_logits_in_transformers(
    model: Path, adapter: Path, peft_logits: np.ndarray, tmp_path: Path
) -> None:
    exported = export(adapter, "merged", tmp_path / "out")
    np.testing.assert_allclose(torch_logits(AutoModelForCausalLM.from_pretrained(exported)), peft_logits, **CLOSE)
    original, carried = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(exported)
    assert carried("some text").input_ids == original("some text").input_ids
    assert carried.chat_template == original.chat_template


def test_an_mlx_export_gives_the_same_logits_in_mlx_lm(
    model: Path, adapter: Path, peft_logits: np.ndarray, tmp_path: Path
) -> None:
    import mlx.core as mx
    from mlx_lm import load

    exported = export(adapter, "mlx", tmp_path / "out")
    loaded, _ = load(str(model), adapter_path=str(exported))
    logits = np.array(loaded(mx.array(IDS)).astype(mx.float32))
    np.testing.assert_allclose(logits, peft_logits, **CLOSE)


def test_a_merged_export_loads_in_mlx_lm(adapter: Path, peft_logits: np.ndarray, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    loaded, _ = load(str(export(adapter, "merged", tmp_path / "out")))
    np.testing.assert_allclose(np.array(loaded(mx.array(IDS)).astype(mx.float32)), peft_logits, **CLOSE)


def test_an_adapter_goes_to_mlx_and_back_without_a_change(adapter: Path, model: Path, tmp_path: Path) -> None:
    there = export(adapter, "mlx", tmp_path / "mlx")
    back = tmp_path / "back"
    assert ft("export", there, "--model", model, "--format", "peft", "--output", back).code == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, back))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "gemma2", "gemma3", "mistral", "phi3", "qwen2", "qwen3"])
def test_exports_of_other_architectures_give_the_logits_of_peft(kind: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    base = make_model(tmp_path / "base", kind)
    if kind == "gpt2":  # mlx-lm reads GPT-2 as the hub has it, without transformers' prefix
        tensors = {name.removeprefix("transformer."): array for name, array in load_file(base / WEIGHTS).items()}
        save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    if kind == "qwen2":  # as its publishers write it; mlx-lm does not read transformers' newer key
        document = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**document, **document["rope_parameters"]}))
    torch.manual_seed(0)
    layout = {"task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2"}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **layout)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    ids = np.array([[1, 10, 20, 30, 40, 50, 60, 70]])
    expected = torch_logits(model, ids)

    for format in ("mlx", "merged"):
        ran = ft(
            "export", tmp_path / "adapter", "--model", base, "--format", format, "--output", tmp_path / format, "--json"
        )
        assert ran.code == 0, ran.err
    by_adapter, _ = load(str(base), adapter_path=str(tmp_path / "mlx"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged, ids), expected, **CLOSE)
    np.testing.assert_allclose(np.array(by_adapter(mx.array(ids)).astype(mx.float32)), expected, rtol=0, atol=GELU)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_mlx_lm_reads_a_merged_model_whose_config_is_in_newer_names(kind: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    base = make_model(tmp_path / "base", kind)
    document = json.loads((base / "config.json").read_text())
    ropes = document["rope_parameters"]
    for rope in (ropes,) if "rope_theta" in ropes else ropes.values():
        rope["rope_theta"] = 77.0  # nobody's default
    (base / "config.json").write_text(json.dumps(document))
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = torch_logits(tuned)
    ran = ft("export", tmp_path / "adapter", "--model", base, "--format", "merged", "--output", tmp_path / "merged")
    assert ran.code == 0, ran.err
    np.testing.assert_allclose(
        torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, **CLOSE
    )
    loaded, _ = load(str(tmp_path / "merged"))
    np.testing.assert_allclose(np.array(loaded(mx.array(IDS)).astype(mx.float32)), expected, rtol=0, atol=GELU)


# A relative error of 2^-9 of each group's range, added up through the layers of random weights; logits are of size 10.
EIGHT_BITS = 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "phi3"])
def test_a_packed_export_loads_in_mlx_lm_and_answers_like_peft(kind: str, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm import load

    base = make_model(tmp_path / "base", kind)
    torch.manual_seed(0)
    layout = {"task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2"}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **layout)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = torch_logits(tuned, np.array([[1, 10, 20, 30, 40, 50, 60, 70]]))
    options = ["--model", base, "--format", "mlx", "--json", "--quantize"]
    for quantize in ("4bit", "8bit"):
        ran = ft("export", tmp_path / "adapter", *options, quantize, "--output", tmp_path / quantize)
        assert ran.code == 0, ran.err
        divergence = ran.json["comparison"]["divergence"]
        assert divergence["exported"] < 0.25 * divergence["base"]
    loaded, _ = load(str(tmp_path / "8bit"))
    logits = np.array(loaded(mx.array([[1, 10, 20, 30, 40, 50, 60, 70]])).astype(mx.float32))
    assert np.abs(logits - expected).max() < EIGHT_BITS
    sizes = [(tmp_path / quantize / WEIGHTS).stat().st_size for quantize in ("4bit", "8bit")]
    assert sizes[0] < sizes[1] < (base / WEIGHTS).stat().st_size


def test_bits_that_mlx_does_not_have_are_refused(adapter: Path, tmp_path: Path) -> None:
    for format, quantize, words in (("mlx", "q4_k_m", "4bit or 8bit"), ("merged", "4bit", "has no effect")):
        ran = ft("export", adapter, "--format", format, "--quantize", quantize, "--output", tmp_path / "out")
        assert ran.code == 2
        assert words in ran.err
        assert not (tmp_path / "out").exists()

"""`ft export --format gguf` and `gguf-lora`: tuned models in llama.cpp, their types, and what is refused."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.gguf_files import write_gguf
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model
from tests.support.tiny_models import make_model
from tests.support.tiny_run import tiny_run

from finetune.data.templates import choose_template
from finetune.data.tokenizer import TextTokenizer
from finetune.export import llamacpp
from finetune.export.gguf.check import largest_error
from finetune.export.llamacpp import serve

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is needed to run what was written")

# PEFT asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

FLOAT32 = 1e-4  # the same sums in another order


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny", base=str(model))


def export(what: object, output: Path, *options: object) -> dict:
    ran = ft("export", what, "--format", "gguf", "--output", output, "--json", *options)
    assert ran.code == 0, ran.err
    return ran.json


def test_an_adapter_is_merged_in_float32(adapter: Path, tmp_path: Path) -> None:
    comparison = export(adapter, tmp_path / "out.gguf", "-q", "f32")["comparison"]
    assert comparison["tolerance"] == FLOAT32
    assert comparison["largest_difference"] < FLOAT32 < comparison["adapter_effect"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.Modelfile", "out.gguf"]
    modelfile = (tmp_path / "out.Modelfile").read_text()
    assert modelfile.startswith("FROM ./out.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi3"])
def test_base_and_lora_in_llama_cpp_answer_like_the_merged_model(kind: str, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", kind)
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2", "use_rslora": True}
    odd = "c_fc" if kind == "gpt2" else "o_proj"
    patterns = {"alpha_pattern": {odd: 3.0}, "rank_pattern": {odd: 2}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options, **patterns)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    options = ["--model", base, "--json"]
    ran = ft("export", tmp_path / "adapter", "--format", "gguf-lora", "--output", tmp_path / "lora.gguf", *options)
    assert ran.code == 0, ran.err
    assert ran.json["comparison"]["largest_difference"] < ran.json["comparison"]["tolerance"]
    export(tmp_path / "adapter", tmp_path / "merged.gguf", "-q", "f32", "--model", base)
    write_gguf(base, tmp_path / "base.gguf")
    ids = [1, 10, 20, 30, 40, 50, 60, 70]
    with serve(tmp_path / "merged.gguf") as server:
        merged = server.next_logprobs(ids, 272)
    with serve(tmp_path / "base.gguf", lora=tmp_path / "lora.gguf") as server:
        together = server.next_logprobs(ids, 272)
    with serve(tmp_path / "base.gguf") as server:
        alone = server.next_logprobs(ids, 272)
    # GELU's table is looked up at values that differ in their last bits, and jumps.
    assert np.abs(merged - together).max() < (FLOAT32 if kind in {"llama", "phi3"} else 5e-3)
    assert np.abs(merged - alone).max() > 0.05


def test_a_full_run_and_a_run_with_an_adapter_are_exported(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    for method in ("lora", "full"):
        run = tiny_run(tmp_path / method, model, method=method)
        result = export(run, tmp_path / f"{method}.gguf")
        assert result["comparison"]["largest_difference"] < FLOAT32
        assert result["comparison"]["adapter_effect"] > 0.1


def test_a_base_in_few_bits_takes_part_as_the_adapter_knew_it(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    run = tiny_run(tmp_path / "lora", model, quantization="4bit")
    comparison = export(run, tmp_path / "out.gguf", "-q", "f32")["comparison"]
    assert comparison["largest_difference"] <= comparison["tolerance"] < comparison["adapter_effect"]


WIDE = 256  # one block of a K-quant a row


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows blocks of 256 divide."""
    from tests.support.gguf_files import make_model_for
    from transformers import LlamaConfig

    folder = make_model(tmp_path_factory.mktemp("models") / "wide")
    sizes = {"vocab_size": 272, "hidden_size": WIDE, "intermediate_size": 2 * WIDE, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return make_model_for(folder, LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


# Mean KL divergence from the float model in nats a token, on random weights of this size: what was measured, doubled.
DISTANCES = {"f16": 1e-6, "q8_0": 1e-4, "q6_k": 3e-4, "q5_k_m": 2e-3, "q4_k_m": 6e-3, "q4_0": 1e-2, "q2_k": 0.2}


@pytest.mark.parametrize("scheme", DISTANCES)
def test_quantised_files_stay_within_a_stated_distance(scheme: str, wide: Path, tmp_path: Path) -> None:
    result = export(wide, tmp_path / "out.gguf", "--quantize", scheme)
    assert result["comparison"]["divergence"]["exported"] < DISTANCES[scheme]


def test_the_mixture_of_q4_k_m_is_llama_cpps(wide: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    write_gguf(wide, tmp_path / "out.gguf", scheme="q4_k_m")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    # Of n = 8 layers those with i < n/8, i >= 7n/8 or (i - n/8) % 3 == 2, as in llama-quantize.
    more = {0, 3, 6, 7}
    for kind in ("attn_v", "ffn_down"):
        found = {layer for layer in range(8) if types[f"blk.{layer}.{kind}.weight"] == "Q6_K"}
        assert found == more
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == types["blk.1.attn_v.weight"] == "Q4_K"
    assert types["output_norm.weight"] == "F32"


def test_rows_that_blocks_do_not_divide_get_the_next_type(model: Path, tmp_path: Path) -> None:
    ran = ft("export", model, "--format", "gguf", "-q", "q4_k_m", "--output", tmp_path / "out.gguf")
    assert ran.code == 0
    assert "no whole number of blocks of 256" in ran.err


def test_without_llama_cpp_the_file_is_read_back(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "find_spec", lambda _name: None)
    ran = ft("export", adapter, "--format", "gguf", "-q", "q8_0", "--output", tmp_path / "out.gguf")
    assert ran.code == 0
    assert "read back" in ran.err
    assert "finetune[llamacpp]" in ran.err
    refused = ft("export", adapter, "--format", "gguf", "-q", "q4_k_m", "--output", tmp_path / "other.gguf")
    assert refused.code == 2
    assert "xllamacpp is not installed" in refused.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.Modelfile", "out.gguf"]


def test_reading_back_finds_a_tensor_that_was_mixed_up(model: Path, tmp_path: Path) -> None:
    content = write_gguf(model, tmp_path / "out.gguf")
    assert largest_error(tmp_path / "out.gguf", content) == 0
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    other = shutil.copytree(model, tmp_path / "other")
    save_file({**tensors, name: tensors[name][::-1].copy()}, other / "model.safetensors", metadata={"format": "pt"})
    write_gguf(other, tmp_path / "other.gguf")
    assert largest_error(tmp_path / "other.gguf", content) > 1


@pytest.fixture
def dora(adapter: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(adapter, tmp_path / "dora")
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_B.weight"
    magnitudes = {
        name.removesuffix(ends) + ".lora_magnitude_vector": np.ones(array.shape[0], np.float32)
        for name, array in tensors.items()
        if name.endswith(ends)
    }
    save_file({**tensors, **magnitudes}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return folder


def refused(tmp_path: Path, *arguments: object, code: int = 1) -> str:
    """The message of an export that fails and leaves nothing."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    before = sorted(place.iterdir())
    ran = ft("export", *arguments, "--output", place / "out.gguf")
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert sorted(place.iterdir()) == before
    return ran.err


def test_dora_is_refused_as_lora_and_merged_as_a_model(dora: Path, tmp_path: Path) -> None:
    assert "This adapter is DoRA" in refused(tmp_path, dora, "--format", "gguf-lora")
    assert export(dora, tmp_path / "out.gguf", "-q", "f32")["comparison"]["largest_difference"] < FLOAT32


def test_an_adapter_of_another_base_is_refused(adapter: Path, wide: Path, tmp_path: Path) -> None:
    for format in ("gguf", "gguf-lora"):
        assert "is it another base's?" in refused(tmp_path, adapter, "--format", format, "--model", wide)


def test_an_unknown_splitting_is_refused_by_its_rules(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = [["a", "b"]]
    document["model"]["vocab"]["ab"] = 300
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, document["pre_tokenizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    message = refused(tmp_path, folder, "--format", "gguf")
    assert "splits text in a way that is not known" in message
    assert "Punctuation" in message


def test_wrong_requests_are_met_before_any_work(adapter: Path, tmp_path: Path) -> None:
    assert "GGUF has no such type" in refused(tmp_path, adapter, "--format", "gguf", "-q", "q9_z", code=2)
    assert "has no effect" in refused(tmp_path, adapter, "--format", "gguf-lora", "-q", "q8_0", code=2)
    (tmp_path / "place" / "out.Modelfile").write_text("mine")
    assert "exists already" in refused(tmp_path, adapter, "--format", "gguf", code=2)
    ran = ft("export", adapter, "--format", "gguf", "--output", tmp_path / "directory")
    assert ran.code == 2
    assert "ends in .gguf" in ran.err


def test_a_file_that_answers_otherwise_is_thrown_away(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.export.gguf import tensors

    monkeypatch.setattr(tensors, "permuted", lambda rows, _heads: rows)
    assert "does not answer like the original" in refused(tmp_path, adapter, "--format", "gguf", "-q", "f32")


def test_a_disk_that_takes_no_more_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        message = refused(tmp_path, adapter, "--format", "gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in message


def test_a_missing_package_is_named(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.export.gguf import writer

    monkeypatch.setattr(writer, "find_spec", lambda _name: None)
    assert "pip install 'finetune[gguf]'" in refused(tmp_path, adapter, "--format", "gguf", code=2)


def test_a_broken_file_is_refused_in_llama_cpps_words(model: Path, tmp_path: Path) -> None:
    from finetune.core.errors import ModelError

    write_gguf(model, tmp_path / "out.gguf", template=choose_template("chatml", TextTokenizer.open(model)))
    content = (tmp_path / "out.gguf").read_bytes()
    (tmp_path / "out.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"llama.cpp cannot load out.gguf: .*"), serve(tmp_path / "out.gguf"):
        pass

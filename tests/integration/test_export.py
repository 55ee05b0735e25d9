"""`ft export` with the real engine: what is refused, and that a failed comparison leaves nothing behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from tests.support.gguf_files import make_model_for
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import HEADS, HIDDEN, INNER, LAYERS, write_tiny_adapter, write_tiny_model

from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.base import Engine
from finetune.engines.registry import choose_engine
from finetune.workflows.export import export


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny", base=str(model))


def test_an_empty_output_directory_is_filled(adapter: Path, tmp_path: Path) -> None:
    result = export(adapter, format="peft", output=tmp_path)
    assert sorted(result.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(result.files)
    assert result.comparison.largest_difference == 0.0


def test_what_was_written_is_said_with_the_comparison(adapter: Path, tmp_path: Path) -> None:
    ran = ft("export", adapter, "--format", "merged", "--output", tmp_path / "out")
    assert ran.code == 0
    assert "model.safetensors" in ran.out
    assert "log-probabilities differ by at most" in ran.out


def test_an_export_that_answers_differently_fails_and_leaves_nothing(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = type(choose_engine(ModelConfig(name="any")))
    merge = engine.merge

    def wrong(self: Engine, base: Path, *, destination: Path, **options: Any) -> object:
        report = merge(self, base, destination=destination, **options)
        weights = load_file(destination / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] += 0.01
        save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
        return report

    monkeypatch.setattr(engine, "merge", wrong)
    with pytest.raises(ModelError, match="does not answer like the original"):
        export(adapter, format="merged", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_leave_nothing_behind(model: Path, adapter: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    other = write_tiny_adapter(tmp_path / "other", layers=3, rank=2)
    out = tmp_path / "out"
    wrong: list[tuple[list[object], int, str]] = [
        ([adapter, "--format", "peft", "--output", full], 2, "not an empty directory"),
        ([adapter, "--format", "gguf", "--output", out], 2, "gguf"),
        ([tmp_path / "none", "--format", "peft", "--output", out], 1, "No adapter at"),
        ([adapter, "--format", "peft", "--output", out, "--checkpoint", "best"], 2, "needs a run"),
        ([other, "--model", model, "--format", "mlx", "--output", out], 1, "layers.2"),
        ([other, "--format", "merged", "--output", out], 2, "names no base model"),
        ([adapter, "--format", "peft", "--output", full / "notes.txt" / "x"], 1, "cannot be written"),
    ]
    for arguments, code, message in wrong:
        ran = ft("export", *arguments)
        assert (ran.code, message in ran.err) == (code, True), (arguments, ran)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "other"]
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_a_whole_model_has_the_tokenizer_that_was_trained_with(adapter: Path, shared: Path, tmp_path: Path) -> None:
    """Others convert tokenizer.model by themselves, and not all of them rank its merges by score."""
    from transformers import AutoTokenizer, LlamaConfig

    base = tmp_path / "base"
    shutil.copytree(shared / "tokenizers/llama2", base)
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    make_model_for(base, LlamaConfig(**shape, num_attention_heads=HEADS, num_key_value_heads=HEADS))
    export(adapter, format="merged", model=str(base), output=tmp_path / "out")
    ours, theirs = TextTokenizer.open(base), AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    text = "def f():\n    return 1"
    assert ours.encode(text)[0].tolist() == theirs(text, add_special_tokens=False).input_ids

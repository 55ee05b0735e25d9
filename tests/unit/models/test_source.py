"""From a name to a checked model directory."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.model_files import shard_model, write_model

from finetune.core.errors import ModelError
from finetune.hub import cache
from finetune.models.source import resolve_model


def refusal(name: str | Path, **options: bool) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(name), **options)
    return str(caught.value)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, in the layout that huggingface_hub reads."""
    from huggingface_hub import constants, file_download

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(file_download.constants, "HF_HUB_CACHE", str(folder))
    return folder


def add_to_cache(hub_cache: Path, name: str) -> Path:
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123", encoding="utf-8")
    return write_model(repository / "snapshots" / "abc123")


def test_a_local_directory_is_read(tmp_path: Path) -> None:
    found = resolve_model(str(write_model(tmp_path / "m")))

    assert (found.model_type, found.vocab_size, found.context_length) == ("llama", 8, 64)
    assert found.path == tmp_path / "m"


def test_a_real_model_is_read(shared: Path) -> None:
    found = resolve_model(str(shared / "models" / "stories260K"))

    assert (found.model_type, found.vocab_size, found.context_length) == ("llama", 512, 512)


@pytest.mark.parametrize(
    ("config", "vocabulary", "context"),
    [
        ({"n_positions": 1024, "max_position_embeddings": None}, 8, 1024),
        ({"vocab_size": None, "padded_vocab_size": 65, "max_position_embeddings": None, "seq_length": 32}, 65, 32),
        ({"text_config": {"vocab_size": 99, "max_position_embeddings": 7}}, 99, 7),
        ({"max_position_embeddings": None}, 8, None),
    ],
)
def test_sizes_are_found_under_the_names_that_architectures_use(
    tmp_path: Path, config: dict[str, Any], vocabulary: int, context: int | None
) -> None:
    found = resolve_model(str(write_model(tmp_path, config=config)))

    assert (found.vocab_size, found.context_length) == (vocabulary, context)


def test_a_cached_model_is_found_by_its_name(hub_cache: Path) -> None:
    snapshot = add_to_cache(hub_cache, "some-org/tiny")

    assert resolve_model("some-org/tiny").path == snapshot
    assert cache.model_names() == ("some-org/tiny",)


def test_a_name_that_is_nowhere_is_answered_with_near_ones_and_how_to_get_it(hub_cache: Path, tmp_path: Path) -> None:
    add_to_cache(hub_cache, "some-org/tiny")
    write_model(tmp_path / "llama")

    assert (
        "Did you mean some-org/tiny? Run `ft models pull some-org/tinny` once, or give the path of a directory."
        in refusal("some-org/tinny")
    )
    assert refusal(tmp_path / "lama") == f"There is no model directory {tmp_path}/lama. Did you mean {tmp_path}/llama?"
    assert "There is no model directory ../no/such/place" in refusal("../no/such/place")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    assert f"give {tmp_path}." in refusal(write_model(tmp_path) / "model.safetensors")


def test_a_directory_without_config_is_refused_and_an_adapter_is_recognised(tmp_path: Path) -> None:
    assert "has no config.json." in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "looks like an adapter: give its base" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": 5}'])
def test_a_config_without_an_architecture_is_refused(tmp_path: Path, content: str) -> None:
    (write_model(tmp_path) / "config.json").write_text(content, encoding="utf-8")

    assert "config.json" in refusal(tmp_path)


def test_a_config_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    assert "has no vocab_size" in refusal(write_model(tmp_path, config={"vocab_size": None}))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path) / "tokenizer.json").unlink()

    assert "has no tokenizer" in refusal(tmp_path)


def test_a_model_without_weights_is_refused_unless_they_are_not_needed(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").unlink()

    assert "has no weights (model.safetensors)" in refusal(tmp_path)
    assert resolve_model(str(tmp_path), weights=False).vocab_size == 8


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    assert "only as pytorch_model.bin. Such pickle files can run any program" in refusal(tmp_path)


def test_weights_under_another_name_are_refused_with_that_name(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").rename(tmp_path / "consolidated.safetensors")

    assert "only consolidated.safetensors. Rename" in refusal(tmp_path)


def test_broken_weights_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    (shard_model(write_model(tmp_path)) / "model-00002-of-00002.safetensors").unlink()

    assert "model-00002-of-00002.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_its_own_code_is_refused_by_name(tmp_path: Path, file: str) -> None:
    model = write_model(tmp_path)
    known = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / file).write_text(json.dumps(known | {"auto_map": {"AutoModel": "evil.Model"}}), encoding="utf-8")

    assert f"auto_map in {file}" in refusal(model, weights=False)

"""Safetensors headers: what they say, and how damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.support.model_files import TENSORS, safetensors_bytes, shard_model, write_model

from finetune.core.errors import ModelError
from finetune.models.weights import INDEX, read_header, read_weights, weight_files


def test_headers_agree_with_what_safetensors_itself_wrote(tmp_path: Path) -> None:
    arrays = {"b": np.zeros((2, 3), np.float32), "a": np.zeros((5,), np.float16), "scalar": np.zeros((), np.int64)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})

    found = read_header(tmp_path / "x.safetensors")

    assert {tensor.name: (tensor.shape, tensor.bytes) for tensor in found} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "its header claims 0 bytes of a file of 0"),
        (b"abc", "its header claims"),
        ((10**15).to_bytes(8, "little") + b"{}", "its header claims 1,000,000,000,000,000 bytes of a file of 10"),
        ((4).to_bytes(8, "little") + b"nope", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        (safetensors_bytes(TENSORS)[:-1], "does not fit its place in the file"),
        (safetensors_bytes(TENSORS) + b"!", "bytes of data, but"),
        (
            safetensors_bytes({"w": (2,)}).replace(b"F32", b"F99"),
            "the entry of w is not complete or of an unknown type",
        ),
        (safetensors_bytes({"w": (2,)}).replace(b"[2]", b"[3]"), "w [3] F32 does not fit"),
        (safetensors_bytes({"w": (2,)}).replace(b'"shape"', b'"shame"'), "the entry of w is not complete"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)

    with pytest.raises(ModelError) as caught:
        read_header(file)

    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_sharded_model_is_read_as_a_whole(tmp_path: Path) -> None:
    whole = read_weights(write_model(tmp_path / "whole"))
    parts = read_weights(shard_model(write_model(tmp_path / "parts")))

    assert sorted((t.name, t.shape) for t in whole) == sorted((t.name, t.shape) for t in parts)


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    model = shard_model(write_model(tmp_path))
    for file in model.glob("model-*.safetensors"):
        file.unlink()

    with pytest.raises(ModelError, match=r"model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"):
        weight_files(model)


def test_a_numbered_set_without_an_index_must_be_complete(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (model / "model.safetensors").rename(model / "model-00002-of-00003.safetensors")

    with pytest.raises(ModelError, match=r"2 of the 3 weight files .* model-00001-of-00003.*model-00003-of-00003"):
        weight_files(model)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    model = shard_model(write_model(tmp_path))
    index = json.loads((model / INDEX).read_text(encoding="utf-8"))
    index["weight_map"]["model.lost.weight"] = "model-00001-of-00002.safetensors"
    (model / INDEX).write_text(json.dumps(index), encoding="utf-8")

    with pytest.raises(ModelError, match=r"model.lost.weight \(expected in model-00001-of-00002.safetensors\)"):
        read_weights(model)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"w": "../../secret"}}'])
def test_an_unreadable_index_is_refused(tmp_path: Path, content: str) -> None:
    model = write_model(tmp_path)
    (model / INDEX).write_text(content, encoding="utf-8")

    with pytest.raises(ModelError, match="Copy or download it again"):
        weight_files(model)

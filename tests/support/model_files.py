"""Small model directories made of files alone: config.json, a tokenizer file, safetensors with zeros."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}

CONFIG: dict[str, Any] = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 64}
# One layer with an embedding, one linear module and a norm.
TENSORS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.norm.weight": (4,),
}


def safetensors_bytes(tensors: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file as its format describes it, all zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        dtype = (dtypes or {}).get(name, "F32")
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def write_model(
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """A whole model directory; tests then break the part that they are about."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | dict(config or {})), encoding="utf-8")
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors or TENSORS, dtypes))
    return directory


def shard_model(directory: Path) -> Path:
    """Split the weights of `write_model` over two files with an index."""
    (directory / "model.safetensors").unlink()
    names = list(TENSORS)
    parts = {"model-00001-of-00002.safetensors": names[:1], "model-00002-of-00002.safetensors": names[1:]}
    for file, members in parts.items():
        (directory / file).write_bytes(safetensors_bytes({name: TENSORS[name] for name in members}))
    weight_map = {name: file for file, members in parts.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return directory

"""Writes a GGUF file: descriptions first, then one tensor after the other, so that only one is in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from finetune.core.errors import UsageError
from finetune.core.types import Dtype
from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.architectures import Shape
from finetune.export.gguf.metadata import add_metadata
from finetune.export.gguf.quantize import Scheme, encode, stored_bytes, type_of
from finetune.export.gguf.tensors import Tensor, TensorPlan
from finetune.export.gguf.tokenizer import TemplateFacts, Vocabulary, add_vocabulary

PACKAGE = "gguf"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """Everything that a GGUF file of a model says."""

    name: str
    shape: Shape
    plan: TensorPlan
    scheme: Scheme
    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    template: TemplateFacts
    rounded_to: Dtype = "float32"  # what the values were rounded to before, where an adapter was merged elsewhere

    def types(self) -> list[str]:
        """ggml's type of each tensor."""
        shape = self.shape
        group = shape.heads // shape.kv_heads
        return [
            type_of(self.scheme, tensor.name, tensor.shape, layers=shape.layers, group=group, tied=shape.tied)
            for tensor in self.plan.tensors
        ]


def require_package() -> None:
    """Raises UsageError where the package `gguf` is missing."""
    if find_spec(PACKAGE) is None:
        raise UsageError(
            "GGUF is written with the package gguf, which is not installed. Run `pip install 'finetune[gguf]'`."
        )


def write_model(file: Path, content: ModelFile) -> None:
    """Write a model. Raises OSError where the disk does not take it."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(file, content.shape.architecture.name)
    number = int(LlamaFileType[content.scheme.file_type])
    rows = content.plan.vocabulary
    add_metadata(writer, content.shape, name=content.name, file_type=number, rows=rows)
    add_vocabulary(writer, content.vocabulary, content.tokenizer, content.template)
    write_tensors(writer, content.plan.tensors, content.types())


def write_tensors(writer: Any, tensors: Sequence[Tensor], types: Sequence[str]) -> None:
    """Write the file of a `gguf.GGUFWriter` that knows its keys, reading one tensor at a time, and close it."""
    from gguf import GGMLQuantizationType

    try:
        for tensor, kind in zip(tensors, types, strict=True):
            size = stored_bytes(kind, tensor.shape)
            element = np.dtype(np.float32)  # the type of the values; the next argument is that of the file
            writer.add_tensor_info(tensor.name, tensor.shape, element, size, GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, types, strict=True):
            writer.write_tensor_data(encode(tensor.name, tensor.read(), kind))
        writer.flush()
    finally:
        writer.close()

"""The rows that a finished run was measured on, made again exactly, or those of another file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.core.errors import DataError
from finetune.data.prepare import PreparedData
from finetune.data.rows import EncodedRow
from finetune.data.tokenizer import TextTokenizer
from finetune.models.source import ModelSource
from finetune.workflows.subjects import Run

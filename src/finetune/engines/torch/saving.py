"""Writes a whole model directory that transformers and mlx-lm load: weights, config, tokenizer, templates."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.models.writing import ModelFiles, copy_companions, write_config, write_shards

_TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

"""The PyTorch engine: CPU, CUDA, and Metal as far as PyTorch allows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from finetune.adapters.lora import AdapterInit
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Dtype, MergeReport
from finetune.engines.base import EngineInfo, InferenceSession, TrainSession
from finetune.engines.features import FEATURES
from finetune.engines.torch import compat, device
from finetune.engines.torch.checkpointing import checkpoint_layers
from finetune.engines.torch.inference import TorchInferenceSession
from finetune.engines.torch.loading import load_base, open_unread
from finetune.engines.torch.lora import linear_paths
from finetune.engines.torch.merge import merge_adapter
from finetune.engines.torch.ordered import in_order
from finetune.engines.torch.quantize import quantization_problems
from finetune.engines.torch.train import TorchTrainSession
from finetune.engines.torch.trainable import FullTrainable, LoraTrainable, Trainable


class TorchEngine:
    """Implements `Engine` with transformers' model definitions."""

    name = "pytorch"
    features = FEATURES[name]
    packs_rows = True  # no padding either way; packed rows fill the micro-batches evenly

    def info(self) -> EngineInfo:
        versions = compat.versions()
        chosen = device.pick_device("auto")
        details = {
            "transformers": versions["transformers"],
            "threads": str(torch.get_num_threads()),
            "bfloat16": "fast" if compat.fast_in_bfloat16(chosen) else "slow",
        }
        return EngineInfo(self.name, versions["torch"], device.device_name(chosen), details)

    def hardware_problems(self, model: ModelConfig) -> Sequence[str]:
        return [*device.hardware_problems(model), *quantization_problems(model.quantization)]

    def compute_dtype(self, model: ModelConfig, stored: Dtype) -> Dtype:
        where = device.pick_device(model.device)
        chosen = device.pick_dtype(model.dtype, device.DTYPES[stored], where)
        return next(name for name, dtype in device.DTYPES.items() if dtype == chosen)

    def matmul_rate(self, dtype: Dtype) -> float:
        return device.matmul_rate(dtype)

    def graphs(self, model: ModelConfig, training: TrainingConfig) -> int:
        return 1

    def free_memory(self, model: ModelConfig) -> int:
        return device.free_memory(device.pick_device(model.device))

    def spare_memory(self) -> None:
        compat.return_large_blocks()

    def open_training(
        self,
        model: Path,
        *,
        model_config: ModelConfig,
        training: TrainingConfig,
        lora: LoraConfig,
        init: AdapterInit,
    ) -> TrainSession:
        with device.explained_memory():
            base = load_base(model, model_config, seed=training.seed)
            trainable: Trainable
            if training.method == "full":
                trainable = FullTrainable(base)
            else:
                trainable = LoraTrainable(base, lora, init, use_dora=training.method == "dora")
            if training.gradient_checkpointing:
                checkpoint_layers(trainable.base.model)
                compat.return_large_blocks()
            return TorchTrainSession(trainable, training)

    def open_inference(
        self, model: Path, *, model_config: ModelConfig, adapters: Mapping[str, Path]
    ) -> InferenceSession:
        with device.explained_memory():
            return TorchInferenceSession(in_order(load_base(model, model_config)), adapters)

    def module_paths(self, model: Path) -> Mapping[str, str]:
        opened, _, _ = open_unread(model)
        return {path: path for path in linear_paths(opened)}

    def merge(
        self, model: Path, *, model_config: ModelConfig, adapter: Path, destination: Path, dequantize: bool = False
    ) -> MergeReport:
        return merge_adapter(model, model_config=model_config, adapter=adapter, destination=destination)

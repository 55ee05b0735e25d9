"""The MLX engine: Metal on Apple silicon, CPU (or CUDA) on Linux."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from finetune.adapters.lora import AdapterInit
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import Dtype, MergeReport
from finetune.engines.base import EngineInfo, InferenceSession, TrainSession
from finetune.engines.features import FEATURES
from finetune.engines.mlx import compat, device
from finetune.engines.mlx.blas import load_openblas
from finetune.engines.mlx.inference import MLXInferenceSession
from finetune.engines.mlx.loading import load_base, open_unread
from finetune.engines.mlx.lora import linear_paths
from finetune.engines.mlx.merge import merge_adapter
from finetune.engines.mlx.train import MLXTrainSession
from finetune.engines.mlx.trainable import FullTrainable, LoraTrainable, Trainable
from finetune.engines.mlx.workers import useful_workers


class MLXEngine:
    """Implements `Engine` with mlx-lm's model definitions."""

    name = "mlx"
    features = FEATURES[name]
    packs_rows = False  # rows of like length side by side

    def info(self) -> EngineInfo:
        versions = compat.versions()
        blas = load_openblas()
        name = f"cpu ({blas.name})" if compat.on_cpu() else compat.device_name()
        advice = blas.advice if compat.on_cpu() else ()
        return EngineInfo(self.name, versions["mlx"], name, {"mlx-lm": versions["mlx-lm"], "blas": blas.name}, advice)

    def hardware_problems(self, model: ModelConfig) -> Sequence[str]:
        return device.hardware_problems(model)

    def compute_dtype(self, model: ModelConfig, stored: Dtype) -> Dtype:
        if model.dtype != "auto":
            return model.dtype
        return "float32" if device.pick_device(model.device) == mx.cpu else stored

    def matmul_rate(self, dtype: Dtype) -> float:
        return device.matmul_rate(dtype)

    def graphs(self, model: ModelConfig, training: TrainingConfig) -> int:
        return useful_workers(training, on_cpu=device.pick_device(model.device) == mx.cpu)

    def free_memory(self, model: ModelConfig) -> int:
        return device.free_memory(model.device)

    def spare_memory(self) -> None:
        """MLX's arrays fit where one of their size was: nothing to do."""

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
                trainable.checkpoint_layers()
            return MLXTrainSession(trainable, training)

    def open_inference(
        self, model: Path, *, model_config: ModelConfig, adapters: Mapping[str, Path]
    ) -> InferenceSession:
        with device.explained_memory():
            return MLXInferenceSession(load_base(model, model_config), adapters)

    def module_paths(self, model: Path) -> Mapping[str, str]:
        opened = open_unread(model, ModelConfig(name=str(model)))
        return {opened.layout.adapter_name(path): path for path in linear_paths(opened.model)}

    def merge(
        self, model: Path, *, model_config: ModelConfig, adapter: Path, destination: Path, dequantize: bool = False
    ) -> MergeReport:
        return merge_adapter(
            model, model_config=model_config, adapter=adapter, destination=destination, dequantize=dequantize
        )

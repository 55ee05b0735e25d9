"""What is trained: adapters on a frozen base, or every weight. Both are flat dictionaries of float32 arrays.

`bind` puts the arrays of a call into the model, so that they can be the arguments of a differentiated function.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from finetune.adapters.lora import AdapterInit
from finetune.adapters.store import Adapter, AdapterConfig, LoraPair, compact_targets, peft_names, write_adapter
from finetune.adapters.targets import choose_ranks
from finetune.config.schema import LoraConfig
from finetune.core.errors import ModelError
from finetune.engines.mlx.adapters import AdaptableModel, adapter_shapes, make_adaptable, read_for
from finetune.engines.mlx.checkpointing import ModuleWeights, SlotWeights, checkpoint_layer, layers_of
from finetune.engines.mlx.loading import BaseModel, is_quantized, read_parameters
from finetune.engines.mlx.lora import LoraWeights
from finetune.engines.mlx.saving import write_model

Weights = dict[str, Any]


class Trainable(Protocol):
    """The part of a model that an optimizer changes."""

    base: BaseModel
    total: int  # parameters of base and adapters
    exact: bool  # whether `save` keeps every bit of the weights

    def initial(self) -> Weights:
        """The weights before the first step."""
        ...

    def bind(self, weights: Weights, dropout_key: Any | None = None) -> None:
        """Let the model compute with these weights; with dropout where a key is given."""
        ...

    def head_parameters(self, weights: Weights) -> tuple[Any, ...]:
        """Those of the weights that belong to the head, in the order of `Head.project`."""
        ...

    def checkpoint_layers(self) -> None:
        """Recompute activations in the backward pass from now on."""
        ...

    def decays(self, name: str, weight: Any) -> bool:
        """Whether weight decay applies to a weight."""
        ...

    def save(self, weights: Weights, directory: Path) -> None:
        """Write what was trained."""
        ...

    def load(self, directory: Path) -> Weights:
        """Read back what `save` wrote."""
        ...


class LoraTrainable:
    """Adapters in float32, in PEFT's names and shapes."""

    def __init__(self, base: BaseModel, lora: LoraConfig, init: AdapterInit) -> None:
        shapes = adapter_shapes(base.model, base.layout, base.split.head.path)
        ranks = choose_ranks(lora, shapes)
        adaptable: AdaptableModel = make_adaptable(base, set(ranks))
        self.base, self._slot = adaptable.base, adaptable.slot
        self.exact = True
        self._slot.dropout = lora.dropout
        others = {module: rank for module, rank in ranks.items() if rank != lora.rank}
        self._config = AdapterConfig(
            rank=lora.rank,
            alpha=lora.effective_alpha,
            target_modules=compact_targets(ranks, shapes),
            base_model=base.name,
            dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            rank_pattern=others,
            fan_in_fan_out=base.layout.transposes,
        )
        self._scales = {module: self._config.scale(module, rank) for module, rank in ranks.items()}
        self._initial: Weights = {}
        for module, rank in ranks.items():
            a, b = peft_names(module)
            self._initial[a] = mx.array(init(module, rank, shapes[module].in_features))
            self._initial[b] = mx.zeros((shapes[module].out_features, rank))
        self.total = count_parameters(base.model) + sum(array.size for array in self._initial.values())

    def initial(self) -> Weights:
        return dict(self._initial)

    def bind(self, weights: Weights, dropout_key: Any | None = None) -> None:
        active = {}
        for module, scale in self._scales.items():
            a, b = peft_names(module)
            active[module] = LoraWeights(weights[a], weights[b], scale)
        self._slot.active, self._slot.keys = active, {}
        if dropout_key is not None and self._slot.dropout:
            self._slot.draw_dropout(dropout_key, self._scales)

    def head_parameters(self, weights: Weights) -> tuple[Any, ...]:
        return ()

    def checkpoint_layers(self) -> None:
        for path, layer in layers_of(self.base.model):
            prefix = f"{self.base.layout.adapter_name(path)}."
            modules = [module for module in self._scales if module.startswith(prefix)]
            checkpoint_layer(layer, SlotWeights(self._slot, modules))

    def decays(self, name: str, weight: Any) -> bool:
        return True

    def save(self, weights: Weights, directory: Path) -> None:
        pairs = {}
        for module in self._scales:
            a, b = peft_names(module)
            pairs[module] = LoraPair(np.array(weights[a]), np.array(weights[b]))
        write_adapter(directory, Adapter(self._config, pairs))

    def load(self, directory: Path) -> Weights:
        adapter = read_for(self.base.model, self.base.layout, directory)
        weights: Weights = {}
        for module, pair in adapter.pairs.items():
            weights.update(zip(peft_names(module), (mx.array(pair.a), mx.array(pair.b)), strict=True))
        expected = {name: array.shape for name, array in self._initial.items()}
        if {name: array.shape for name, array in weights.items()} != expected:
            raise ModelError(f"{directory} holds adapters of other modules or ranks than this configuration trains.")
        return {name: weights[name] for name in expected}


class FullTrainable:
    """Every weight, kept in float32; products are in the base's type. Tied weights are one weight."""

    def __init__(self, base: BaseModel) -> None:
        if is_quantized(base.model):
            raise ModelError(
                f"{base.path} is quantised: its weights cannot all be trained. "
                "Use training.method: lora, or a model that is not quantised."
            )
        if base.layout.rearranged:
            raise ModelError(
                f"training.method: full cannot write a {base.layout.model_type} model back: mlx-lm rearranges "
                f"{len(base.layout.rearranged)} of its tensors on loading. Use training.method: lora."
            )
        self.base = base
        self.exact = bool(base.dtype == mx.float32)
        self._matrices = _matrices(base.model)
        self.total = count_parameters(base.model)

    def initial(self) -> Weights:
        flat = tree_flatten(self.base.model.trainable_parameters())
        return {name: array.astype(mx.float32) for name, array in flat}

    def bind(self, weights: Weights, dropout_key: Any | None = None) -> None:
        cast = [(name, array.astype(self.base.dtype)) for name, array in weights.items()]
        self.base.model.update(tree_unflatten(cast))

    def head_parameters(self, weights: Weights) -> tuple[Any, ...]:
        return tuple(weights[name].astype(self.base.dtype) for name in self.base.split.head.parameters)

    def checkpoint_layers(self) -> None:
        for _, layer in layers_of(self.base.model):
            checkpoint_layer(layer, ModuleWeights(layer))

    def decays(self, name: str, weight: Any) -> bool:
        return name in self._matrices

    def save(self, weights: Weights, directory: Path) -> None:
        cast = {name: array.astype(self.base.dtype) for name, array in weights.items()}
        tensors = self.base.layout.file_tensors(self.base.model, cast)
        write_model(directory, self.base.path, tensors)

    def load(self, directory: Path) -> Weights:
        found = read_parameters(replace(self.base, path=directory))
        return {name: array.astype(mx.float32) for name, array in found.items()}


def _matrices(model: Any) -> frozenset[str]:
    """Weights of linear modules and embeddings: those that decay. Norms and biases do not."""
    kinds = nn.Linear | nn.Embedding
    return frozenset(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, kinds))


def count_parameters(model: Any) -> int:
    """Scalars of the model; a quantised matrix counts as what it stands for."""
    total = sum(array.size for _, array in tree_flatten(model.parameters()))
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed = module.weight.size
            groups = sum(module[name].size for name in ("scales", "biases") if name in module)
            total += packed * 32 // module.bits - packed - groups
    return int(total)

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

from finetune.adapters.adapter import Adapter, LoraUpdate, peft_names
from finetune.adapters.lora import AdapterInit
from finetune.adapters.peft import write_adapter
from finetune.adapters.plan import plan_adapters
from finetune.config.schema import LoraConfig
from finetune.core.errors import ModelError
from finetune.engines.mlx.adapters import AdaptableModel, adapter_shapes, make_adaptable, read_for
from finetune.engines.mlx.checkpointing import ModuleWeights, SlotWeights, checkpoint_layer
from finetune.engines.mlx.dora import row_norms
from finetune.engines.mlx.layout import layers_of
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
    """Adapters in float32, in PEFT's names and shapes; with `use_dora` a magnitude beside each."""

    def __init__(self, base: BaseModel, lora: LoraConfig, init: AdapterInit, *, use_dora: bool = False) -> None:
        self._plan = plan_adapters(
            lora,
            use_dora=use_dora,
            available=adapter_shapes(base.model, base.layout, base.split.head.path),
            base_model=base.name,
            fan_in_fan_out=base.layout.transposes,
        )
        adaptable: AdaptableModel = make_adaptable(base, set(self._plan.ranks))
        self.base, self._slot = adaptable.base, adaptable.slot
        self.exact = True
        self._slot.dropout = lora.dropout
        self._norms = row_norms(adaptable.layers) if use_dora else None
        self._initial: Weights = {}
        for module, update in self._plan.initial(init).items():
            names = peft_names(module)
            self._initial[names.a], self._initial[names.b] = mx.array(update.a), mx.array(update.b)
            if update.magnitude is not None:
                self._initial[names.magnitude] = mx.array(update.magnitude)
            elif self._norms is not None:
                self._initial[names.magnitude] = self._norms.initial(module)
        self.total = count_parameters(base.model) + sum(array.size for array in self._initial.values())

    def initial(self) -> Weights:
        return dict(self._initial)

    def bind(self, weights: Weights, dropout_key: Any | None = None) -> None:
        self._slot.active = {module: self._update(weights, module) for module in self._plan.ranks}
        self._slot.keys = {}
        if dropout_key is not None and self._slot.dropout:
            self._slot.draw_dropout(dropout_key, self._plan.ranks)

    def _update(self, weights: Weights, module: str) -> LoraWeights:
        names = peft_names(module)
        a, b, scale = weights[names.a], weights[names.b], self._plan.scale(module)
        if self._norms is None:
            return LoraWeights(a, b, scale)
        return LoraWeights(a, b, scale, weights[names.magnitude], self._norms.updated(module, a, b, scale))

    def head_parameters(self, weights: Weights) -> tuple[Any, ...]:
        return ()

    def checkpoint_layers(self) -> None:
        for path, layer in layers_of(self.base.model):
            prefix = f"{self.base.layout.adapter_name(path)}."
            modules = [module for module in self._plan.ranks if module.startswith(prefix)]
            checkpoint_layer(layer, SlotWeights(self._slot, modules))

    def decays(self, name: str, weight: Any) -> bool:
        return True

    def save(self, weights: Weights, directory: Path) -> None:
        updates = {}
        for module in self._plan.ranks:
            arrays = [np.array(weights[name]) for name in peft_names(module) if name in weights]
            updates[module] = LoraUpdate(*arrays)
        write_adapter(directory, Adapter(self._plan.config, updates))

    def load(self, directory: Path) -> Weights:
        adapter = read_for(self.base.model, self.base.layout, directory)
        weights: Weights = {}
        for module, update in adapter.updates.items():
            named = zip(peft_names(module), update, strict=True)
            weights.update({name: mx.array(array) for name, array in named if array is not None})
        expected = {name: array.shape for name, array in self._initial.items()}
        if {name: array.shape for name, array in weights.items()} != expected:
            raise ModelError(
                f"{directory} holds adapters of other modules, ranks or method than this configuration trains."
            )
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

"""What is trained: adapters on a frozen base, or every weight. Both are `Masters`, float32 in one buffer.

The model computes with views of the masters, or with copies in the base's type; gradients arrive in the masters'
second buffer as the backward pass produces them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.adapters.adapter import Adapter, LoraUpdate, peft_names
from finetune.adapters.lora import AdapterInit
from finetune.adapters.peft import write_adapter
from finetune.adapters.plan import plan_adapters
from finetune.config.schema import LoraConfig
from finetune.core.errors import ModelError
from finetune.core.types import FloatArray
from finetune.engines.torch.adapters import make_adaptable, read_for
from finetune.engines.torch.loading import BaseModel, checked_places, stored_weights
from finetune.engines.torch.lora import LoraWeights, linear_paths
from finetune.engines.torch.masters import Masters
from finetune.engines.torch.ordered import OrderedLinear
from finetune.engines.torch.quantize import QuantizedLinear, is_quantized
from finetune.engines.torch.reading import read_tensor
from finetune.engines.torch.saving import write_model


class Trainable(Protocol):
    """The part of a model that an optimizer changes."""

    base: BaseModel
    masters: Masters
    total: int  # parameters of base and adapters
    exact: bool  # whether `save` keeps every bit of the weights

    def refresh(self) -> None:
        """The masters have changed: compute with them from here on."""
        ...

    def draw_dropout(self, entropy: Sequence[int] | None) -> None:
        """Dropout from here on, a function of `entropy`; none of it with None."""
        ...

    def save(self, directory: Path) -> None:
        """Write what was trained."""
        ...

    def load(self, directory: Path) -> Mapping[str, Tensor]:
        """Read back what `save` wrote, by the masters' names."""
        ...


class LoraTrainable:
    """Adapters in float32, in PEFT's names and shapes."""

    def __init__(self, base: BaseModel, lora: LoraConfig, init: AdapterInit, *, use_dora: bool = False) -> None:
        self.total = count_parameters(base.model)
        self._plan = plan_adapters(
            lora,
            use_dora=use_dora,
            available=linear_paths(base.model, base.split.head.path),
            base_model=base.name,
            fan_in_fan_out=base.layout.transposes,
        )
        adaptable = make_adaptable(base, set(self._plan.ranks))
        self.base, self._slot = adaptable.base, adaptable.slot
        self.exact = True
        self._slot.dropout = lora.dropout
        initial = _by_name(self._initial(init))
        self.masters = Masters({name: tuple(value.shape) for name, value in initial.items()}, _always, base.device)
        self.masters.set(initial)
        self.total += len(self.masters.weights)
        self._slot.active = self._active()

    def _initial(self, init: AdapterInit) -> dict[str, LoraUpdate]:
        updates = self._plan.initial(init)
        if self._plan.config.use_dora:
            for module, update in updates.items():
                if update.magnitude is None:
                    updates[module] = update._replace(magnitude=self._row_norms(module))
        return updates

    def _row_norms(self, module: str) -> FloatArray:
        layer: Any = self.base.model.get_submodule(module)
        norms: FloatArray = layer.row_scales.initial().cpu().numpy()
        return norms

    def _active(self) -> dict[str, LoraWeights]:
        leaves = {}
        for name, weight, gradient in self.masters.named():
            leaves[name] = weight.detach().requires_grad_()
            leaves[name].grad = gradient
        active = {}
        for module in self._plan.ranks:
            names = peft_names(module)
            scale = self._plan.scale(module)
            active[module] = LoraWeights(leaves[names.a], leaves[names.b], scale, leaves.get(names.magnitude))
        return active

    def refresh(self) -> None:
        """Nothing to do: the slot holds views of the masters."""

    def draw_dropout(self, entropy: Sequence[int] | None) -> None:
        self._slot.seeds = {}
        if entropy is not None and self._slot.dropout:
            self._slot.draw_dropout(entropy, self._plan.ranks)

    def save(self, directory: Path) -> None:
        found = {name: weight.cpu().numpy().copy() for name, weight in self.masters.views(self.masters.weights).items()}
        updates = {}
        for module in self._plan.ranks:
            names = peft_names(module)
            updates[module] = LoraUpdate(found[names.a], found[names.b], found.get(names.magnitude))
        write_adapter(directory, Adapter(self._plan.config, updates))

    def load(self, directory: Path) -> Mapping[str, Tensor]:
        weights = _by_name(read_for(self.base.model, directory).updates)
        if {name: value.shape for name, value in weights.items()} != self.masters.shapes:
            raise ModelError(f"{directory} holds adapters of other modules or ranks than this configuration trains.")
        return weights


def _by_name(updates: Mapping[str, LoraUpdate]) -> dict[str, Tensor]:
    """The matrices by PEFT's names."""
    weights = {}
    for module, update in updates.items():
        named = zip(peft_names(module), update, strict=True)
        weights.update({name: torch.from_numpy(array) for name, array in named if array is not None})
    return weights


def _always(name: str) -> bool:
    return True


class FullTrainable:
    """Every weight, kept in float32; products are in the base's type. Tied weights are one weight."""

    def __init__(self, base: BaseModel) -> None:
        if is_quantized(base.model):
            raise ModelError(
                f"{base.path} is quantised on loading (model.quantization): its weights cannot all be trained. "
                "Use training.method: lora or dora, or leave model.quantization out."
            )
        self.base = base
        self.exact = base.dtype == torch.float32
        self.total = count_parameters(base.model)
        self._parameters = dict(base.model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self.masters = Masters(shapes, _matrices(base.model).__contains__, base.device)
        for name, weight, gradient in self.masters.named():
            self._connect(self._parameters[name], weight, gradient)

    def _connect(self, parameter: nn.Parameter, weight: Tensor, gradient: Tensor) -> None:
        """In float32 the parameter becomes a view of its master; in 16 bits gradients are added up in float32."""
        weight.copy_(parameter.detach())
        if self.exact:
            parameter.data = weight
        parameter.requires_grad_()
        if self.exact:
            parameter.grad = gradient
        else:
            parameter.register_post_accumulate_grad_hook(_moved_into(gradient))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def refresh(self) -> None:
        if not self.exact:
            for name, weight in self.masters.views(self.masters.weights).items():
                self._parameters[name].copy_(weight)

    def draw_dropout(self, entropy: Sequence[int] | None) -> None:
        """No adapter, no dropout."""

    def save(self, directory: Path) -> None:
        views = self.masters.views(self.masters.weights)
        tensors = {self.base.layout.file_name(name): value for name, value in views.items()}
        write_model(directory, self.base.path, tensors, self.base.dtype)

    def load(self, directory: Path) -> Mapping[str, Tensor]:
        _, places = checked_places(directory, self.base.model, stored_weights(directory))
        return {name: read_tensor(places[name]).float() for name in self.masters.shapes}


def _moved_into(sums: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a finished gradient to `sums` and lets go of it."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            sums.add_(parameter.grad)
            parameter.grad = None

    return hook


def _matrices(model: nn.Module) -> frozenset[str]:
    """Weights of linear modules and embeddings: those that decay. Norms and biases do not."""
    embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return frozenset(f"{path}.weight" for path in embeddings | linear_paths(model).keys())


def count_parameters(model: nn.Module) -> int:
    """Scalars of the model, a weight that two modules share once; a matrix that is stored otherwise counts as what it
    stands for.
    """
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear | OrderedLinear)]
    dense = sum(parameter.numel() for parameter in model.parameters())
    return dense + sum(module.in_features * module.out_features for module in packed)

"""Update rules as functions of (gradient, state, step), over the buffers of `Masters`, in place and in parts.

The formulas are those of the MLX engine's optimizer.py. A step that is not finite leaves weights and state as they
were, decided on the device: no synchronisation. AdamW and Adafactor decay weights decoupled from the gradient; Adam
and SGD add the decay to the gradient, as their authors and PyTorch do.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from finetune.config.schema import TrainingConfig
from finetune.engines.torch.masters import Masters

Slots: TypeAlias = dict[str, Tensor]
STEP = "step"  # the state's counter of applied steps; everything else is named <slot>:<weight>

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_
_ADAFACTOR_EPSILON = 1e-30
_ADAFACTOR_DECAY = -0.8
_ADAFACTOR_CLIP = 1.0
_CPU_PART = 1 << 16  # elements updated together: what a rule reads and writes stays in the cache
_GPU_PART = 1 << 24


class Rule(NamedTuple):
    """An update rule, all in float32. An elementwise one is free to see several weights as one."""

    elementwise: bool
    slots: Callable[[Tensor], Slots]  # weight -> its first state
    update: Callable[[Tensor, Slots, Tensor], tuple[Tensor, Slots]]  # (gradient, slots, step from 1)


class Part(NamedTuple):
    """What a rule updates at once; all tensors are views of what is updated in place."""

    weight: Tensor
    gradient: Tensor
    slots: Slots
    decays: bool


class Updated(NamedTuple):
    """How a step went, as scalars of the device."""

    norm: Tensor  # of the whole gradient, before clipping
    applied: Tensor  # False: weights and state are the ones before


class Optimizer:
    """A rule with clipping, weight decay and the guard."""

    def __init__(self, training: TrainingConfig, masters: Masters) -> None:
        self._masters = masters
        self._rule = _RULES[training.optimizer](training)
        self._decay = training.weight_decay
        self._coupled = training.optimizer in {"adam", "sgd"}
        self._max_norm = training.max_grad_norm
        self.state = {STEP: torch.zeros((), dtype=torch.int32, device=masters.weights.device)}
        self._parts = list(self._elementwise_parts() if self._rule.elementwise else self._weight_parts())

    def _elementwise_parts(self) -> Iterator[Part]:
        """The buffers cut into parts, with a border where decay ends."""
        masters = self._masters
        buffers = self._rule.slots(masters.weights)
        for slot, buffer in buffers.items():
            self.state.update({f"{slot}:{name}": view for name, view in masters.views(buffer).items()})
        size = _CPU_PART if masters.weights.device.type == "cpu" else _GPU_PART
        starts = {*range(0, masters.decaying, size), *range(masters.decaying, len(masters.weights), size)}
        borders = [*sorted(starts), len(masters.weights)]
        for start, end in pairwise(borders):
            slots = {slot: buffer[start:end] for slot, buffer in buffers.items()}
            yield Part(masters.weights[start:end], masters.gradients[start:end], slots, start < masters.decaying)

    def _weight_parts(self) -> Iterator[Part]:
        for name, weight, gradient in self._masters.named():
            slots = self._rule.slots(weight)
            self.state.update({f"{slot}:{name}": value for slot, value in slots.items()})
            yield Part(weight, gradient, slots, self._masters.decays(name))

    @torch.no_grad()
    def update(self, *, loss: Tensor, tokens: int, learning_rate: float) -> Updated:
        """One step with gradients and loss that are sums over `tokens` trained tokens."""
        norm = torch.linalg.vector_norm(self._masters.gradients) / tokens
        factor = torch.full_like(norm, 1.0 / tokens)
        if self._max_norm is not None:
            factor = factor * (self._max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        step = self.state[STEP] + 1
        for part in self._parts:
            decayed, gradient = self._decayed(part, part.gradient * factor, learning_rate)
            direction, slots = self._rule.update(gradient, part.slots, step)
            _replace(part.weight, decayed - learning_rate * direction, finite)
            for slot, value in slots.items():
                _replace(part.slots[slot], value, finite)
        _replace(self.state[STEP], step, finite)
        return Updated(norm, finite)

    def _decayed(self, part: Part, gradient: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        if not self._decay or not part.decays:
            return part.weight, gradient
        if self._coupled:
            return part.weight, gradient + self._decay * part.weight
        return part.weight * (1.0 - self._decay * learning_rate), gradient


def _replace(target: Tensor, value: Tensor, finite: Tensor) -> None:
    torch.where(finite, value, target, out=target)


def _adam(training: TrainingConfig) -> Rule:
    """Kingma and Ba 2015, algorithm 1, with bias correction."""
    beta1, beta2, epsilon = training.beta1, training.beta2, training.epsilon

    def update(gradient: Tensor, slots: Slots, step: Tensor) -> tuple[Tensor, Slots]:
        m = torch.add(slots["m"] * beta1, gradient, alpha=1.0 - beta1)
        v = torch.addcmul(slots["v"] * beta2, gradient, gradient, value=1.0 - beta2)
        first, second = _one_minus_power(beta1, step), _one_minus_power(beta2, step)
        return (m / first).div_((v / second).sqrt_().add_(epsilon)), {"m": m, "v": v}

    return Rule(True, lambda weight: {"m": torch.zeros_like(weight), "v": torch.zeros_like(weight)}, update)


def _one_minus_power(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step without the cancellation that costs float32 four digits at the first steps."""
    return -torch.expm1(step.float() * math.log(beta)) if beta else torch.ones_like(step, dtype=torch.float32)


def _sgd(training: TrainingConfig) -> Rule:
    """Heavy-ball momentum: v = beta1 v + g; w = w - lr v."""

    def update(gradient: Tensor, slots: Slots, step: Tensor) -> tuple[Tensor, Slots]:
        v = training.beta1 * slots["v"] + gradient
        return v, {"v": v}

    return Rule(True, lambda weight: {"v": torch.zeros_like(weight)}, update)


def _adafactor(training: TrainingConfig) -> Rule:
    """Shazeer and Stern 2018, algorithm 4, without relative step sizes: the learning rate is the schedule's."""

    def slots_of(weight: Tensor) -> Slots:
        if weight.ndim < 2:
            return {"v": torch.zeros_like(weight)}
        return {"row": torch.zeros_like(weight[..., 0]), "column": torch.zeros_like(weight[..., 0, :])}

    def update(gradient: Tensor, slots: Slots, step: Tensor) -> tuple[Tensor, Slots]:
        beta = 1.0 - step.float() ** _ADAFACTOR_DECAY
        square = gradient.square() + _ADAFACTOR_EPSILON
        if "v" in slots:
            slots = {"v": beta * slots["v"] + (1.0 - beta) * square}
            direction = gradient * slots["v"].rsqrt()
        else:
            row = beta * slots["row"] + (1.0 - beta) * square.mean(dim=-1)
            column = beta * slots["column"] + (1.0 - beta) * square.mean(dim=-2)
            slots = {"row": row, "column": column}
            shape = (row / row.mean(dim=-1, keepdim=True)).rsqrt()
            direction = gradient * shape[..., None] * column.rsqrt()[..., None, :]
        rms = direction.square().mean().sqrt()
        return direction / (rms / _ADAFACTOR_CLIP).clamp(min=1.0), slots

    return Rule(False, slots_of, update)


_RULES: Mapping[str, Callable[[TrainingConfig], Rule]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
}

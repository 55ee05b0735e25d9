"""Update rules as pure functions of (weights, gradients, state, learning rate), over flat dictionaries.

A step that is not finite leaves weights and state as they were, decided on the device: no synchronisation.
AdamW and Adafactor decay weights decoupled from the gradient; Adam and SGD add the decay to the gradient, as their
authors and PyTorch do.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from finetune.config.schema import TrainingConfig

Arrays: TypeAlias = dict[str, Any]
Slots: TypeAlias = dict[str, Any]
STEP = "step"  # the state's counter of applied steps; everything else is named <slot>:<weight>

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_
_ADAFACTOR_EPSILON = 1e-30
_ADAFACTOR_DECAY = -0.8
_ADAFACTOR_CLIP = 1.0


class Rule(NamedTuple):
    """An update rule for one weight, all in float32."""

    slots: Callable[[Any], Slots]  # weight -> its first state
    update: Callable[[Any, Slots, Any], tuple[Any, Slots]]  # (gradient, slots, step from 1) -> (direction, slots)


class Updated(NamedTuple):
    """What a step leaves, as arrays of the device."""

    weights: Arrays
    state: Arrays
    norm: Any  # of the whole gradient, before clipping
    applied: Any  # False: weights and state are the ones before


class Optimizer:
    """A rule with clipping, weight decay and the guard. `decays` says which weights decay, by name and array."""

    def __init__(self, training: TrainingConfig, decays: Callable[[str, Any], bool]) -> None:
        self._rule = _RULES[training.optimizer](training)
        self._decay = training.weight_decay
        self._coupled = training.optimizer in {"adam", "sgd"}
        self._decays = decays
        self._max_norm = training.max_grad_norm

    def initial_state(self, weights: Mapping[str, Any]) -> Arrays:
        """State before the first step."""
        state = {STEP: mx.array(0, mx.int32)}
        for name, weight in weights.items():
            state.update({f"{slot}:{name}": value for slot, value in self._rule.slots(weight).items()})
        return state

    def update(
        self, weights: Arrays, gradients: Arrays, state: Arrays, *, loss: Any, tokens: Any, learning_rate: Any
    ) -> Updated:
        """One step with gradients and loss that are sums over `tokens` trained tokens."""
        squares: Any = sum(mx.square(g.astype(mx.float32)).sum() for g in gradients.values())
        norm = mx.sqrt(squares) / tokens
        factor = 1.0 / tokens
        if self._max_norm is not None:
            factor = factor * mx.minimum(self._max_norm / (norm + _CLIP_EPSILON), 1.0)
        finite = mx.isfinite(norm) & mx.isfinite(loss)
        step = state[STEP] + 1
        new_weights, new_state = {}, {STEP: mx.where(finite, step, state[STEP])}
        previous = [finite]
        for name, weight in weights.items():
            slots = {slot: state[f"{slot}:{name}"] for slot in self._rule.slots(weight)}
            [gradient] = mx.depends([gradients[name]], previous)  # one weight's intermediate arrays at a time
            gradient = gradient.astype(mx.float32) * factor
            decayed, gradient = self._decayed(name, weight, gradient, learning_rate)
            direction, new_slots = self._rule.update(gradient, slots, step)
            updated = decayed - learning_rate * direction
            new_weights[name] = mx.where(finite, updated, weight)
            kept = {f"{slot}:{name}": mx.where(finite, value, slots[slot]) for slot, value in new_slots.items()}
            new_state |= kept
            previous = [new_weights[name], *kept.values()]
        return Updated(new_weights, new_state, norm, finite)

    def _decayed(self, name: str, weight: Any, gradient: Any, learning_rate: Any) -> tuple[Any, Any]:
        if not self._decay or not self._decays(name, weight):
            return weight, gradient
        if self._coupled:
            return weight, gradient + self._decay * weight
        return weight * (1.0 - self._decay * learning_rate), gradient


def _adam(training: TrainingConfig) -> Rule:
    """Kingma and Ba 2015, algorithm 1, with bias correction."""
    beta1, beta2, epsilon = training.beta1, training.beta2, training.epsilon

    def update(gradient: Any, slots: Slots, step: Any) -> tuple[Any, Slots]:
        m = beta1 * slots["m"] + (1.0 - beta1) * gradient
        v = beta2 * slots["v"] + (1.0 - beta2) * mx.square(gradient)
        first, second = _one_minus_power(beta1, step), _one_minus_power(beta2, step)
        return (m / first) / (mx.sqrt(v / second) + epsilon), {"m": m, "v": v}

    return Rule(lambda weight: {"m": mx.zeros_like(weight), "v": mx.zeros_like(weight)}, update)


def _one_minus_power(beta: float, step: Any) -> Any:
    """1 - beta^step without the cancellation that costs float32 four digits at the first steps."""
    return -mx.expm1(step.astype(mx.float32) * math.log(beta)) if beta else mx.array(1.0)


def _sgd(training: TrainingConfig) -> Rule:
    """Heavy-ball momentum: v = beta1 v + g; w = w - lr v."""

    def update(gradient: Any, slots: Slots, step: Any) -> tuple[Any, Slots]:
        v = training.beta1 * slots["v"] + gradient
        return v, {"v": v}

    return Rule(lambda weight: {"v": mx.zeros_like(weight)}, update)


def _adafactor(training: TrainingConfig) -> Rule:
    """Shazeer and Stern 2018, algorithm 4, without relative step sizes: the learning rate is the schedule's."""

    def slots_of(weight: Any) -> Slots:
        if weight.ndim < 2:
            return {"v": mx.zeros_like(weight)}
        shape = weight.shape
        return {"row": mx.zeros(shape[:-1]), "column": mx.zeros((*shape[:-2], shape[-1]))}

    def update(gradient: Any, slots: Slots, step: Any) -> tuple[Any, Slots]:
        beta = 1.0 - mx.power(step.astype(mx.float32), _ADAFACTOR_DECAY)
        square = mx.square(gradient) + _ADAFACTOR_EPSILON
        if "v" in slots:
            slots = {"v": beta * slots["v"] + (1.0 - beta) * square}
            direction = gradient * mx.rsqrt(slots["v"])
        else:
            row = beta * slots["row"] + (1.0 - beta) * square.mean(axis=-1)
            column = beta * slots["column"] + (1.0 - beta) * square.mean(axis=-2)
            slots = {"row": row, "column": column}
            shape = mx.rsqrt(row / row.mean(axis=-1, keepdims=True))
            direction = gradient * shape[..., None] * mx.rsqrt(column)[..., None, :]
        rms = mx.sqrt(mx.square(direction).mean())
        return direction / mx.maximum(1.0, rms / _ADAFACTOR_CLIP), slots

    return Rule(slots_of, update)


_RULES: Mapping[str, Callable[[TrainingConfig], Rule]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
}

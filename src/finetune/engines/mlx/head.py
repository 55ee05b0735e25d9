"""Splits a language model into its body (tokens to hidden states) and its head (hidden states to logits).

The loss needs the head only at trained positions and a few rows at a time, but mlx-lm's models compute both in
one call. Where the head is and what follows it (soft cap, scale) is tried from a short list, and taken only if
it reproduces the model's own logits; a model that fits nothing is run as a whole.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from finetune.engines.mlx import compat
from finetune.engines.mlx.attention import attend
from finetune.engines.mlx.documents import Documents
from finetune.engines.mlx.swiglu import swiglu

Finish = Callable[[Any], Any]
_PROBE_SCALE = 64.0  # logits as large as this show a soft cap, which is invisible near zero


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection. `path` is its module's; parameters may be passed in to differentiate them."""

    path: str
    project: Callable[..., Any]  # (hidden [N, D], *parameters) -> raw logits [N, V]
    finish: Finish  # raw logits -> logits, element by element
    parameters: tuple[str, ...]  # names of what `project` takes, in order; empty where there is no head to train


@dataclass(frozen=True, slots=True)
class SplitModel:
    """`body(inputs, cache)` gives hidden states [B, T, D]; `head` makes logits of them."""

    body: Callable[..., Any]
    head: Head
    layers: int  # entries that `cache` needs
    takes_documents: bool  # whether `cache` may hold `Documents`: several in a row, apart from each other

    def logits(self, hidden: Any) -> Any:
        """Logits [..., V] with the weights that the model holds."""
        return self.head.finish(self.head.project(hidden))


def split_model(model: Any, config: Mapping[str, Any]) -> SplitModel:
    """The split that reproduces `model(inputs)`, or the whole model with an empty head."""
    compat.route_attention(model, Documents, attend)
    compat.replace_swiglu(model, swiglu)
    whole = _whole(model)
    for owner_path, owner in _owners(model):
        body = owner.get("model") or owner.get("transformer") or owner.get("backbone")
        if body is None:
            continue
        for path, module in _projections(owner_path, owner, body):
            for finish in _finishers(config):
                candidate = replace(whole, body=body, head=_head(path, module, finish))
                if _reproduces(model, module, candidate):
                    return candidate
    return whole


def _whole(model: Any) -> SplitModel:
    """The whole model as a body, for a head that cannot be taken apart."""
    layers = len(compat.new_cache(model))
    head = Head("", _identity, _identity, ())
    return SplitModel(model, head, layers, _keeps_documents_apart(model, layers))


def unsplit(split: SplitModel, model: Any) -> SplitModel:
    """`split` with the head inside the body, for a head that is more than a projection."""
    return replace(split, body=model, head=Head("", _identity, _identity, ()))


def _keeps_documents_apart(model: Any, layers: int) -> bool:
    """Compare two documents in one row with each of them alone."""
    first, second = mx.array([[0, 1, 2]]), mx.array([[3, 2]])
    try:
        both = model(mx.concatenate([first, second], axis=1), cache=[Documents((3, 2))] * layers)
        expected = mx.concatenate([model(first), model(second)], axis=1)
        tolerance = max(1e-3, 4 * mx.finfo(expected.dtype).eps) * mx.abs(expected).max()
        return bool((mx.abs(both - expected).max() < tolerance).item())
    except (ValueError, TypeError, AttributeError):  # a model that computes with its mask or its cache
        return False


def _identity(array: Any, *_: Any) -> Any:
    return array


def _owners(model: Any) -> Iterator[tuple[str, Any]]:
    """The module that has the body and the head: the model, or its text part where it reads images too."""
    yield "", model
    if "language_model" in model:
        yield "language_model.", model["language_model"]


def _projections(owner_path: str, owner: Any, body: Any) -> Iterator[tuple[str, Any]]:
    """Modules that may be the head: a linear one of the owner, else an embedding of the body (tied weights)."""
    for name, module in owner.children().items():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            yield f"{owner_path}{name}", module
    body_name = next(name for name, module in owner.children().items() if module is body)
    for name, module in body.children().items():
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            yield f"{owner_path}{body_name}.{name}", module


def _finishers(config: Mapping[str, Any]) -> Iterator[Finish]:
    """What architectures do to raw logits, by the key of config.json that asks for it."""
    if cap := config.get("final_logit_softcapping"):
        yield lambda raw: mx.tanh(raw / cap) * cap
    if scale := config.get("logit_scale"):
        yield lambda raw: raw * scale
    if scaling := config.get("logits_scaling"):
        yield lambda raw: raw / scaling
    yield _identity


def _head(path: str, module: Any, finish: Finish) -> Head:
    tied = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    quantized = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)

    def project(hidden: Any, *parameters: Any) -> Any:
        if not parameters:
            return module.as_linear(hidden) if tied else module(hidden)
        weight, *bias = parameters
        raw = hidden @ weight.T
        return raw + bias[0] if bias else raw

    names = () if quantized else tuple(f"{path}.{name}" for name in ("weight", "bias") if name in module)
    return Head(path, project, finish, names)


def _reproduces(model: Any, module: Any, candidate: SplitModel) -> bool:
    """Compare on three tokens, with the head's weights scaled up so that its logits are large."""
    inputs = mx.array([[0, 1, 2]])
    weight = module.weight
    quantized = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    try:
        if not quantized:
            largest: Any = mx.abs(candidate.head.project(candidate.body(inputs))).max().item()
            module.weight = weight * (_PROBE_SCALE / largest) if largest > 0 else weight
        expected = model(inputs).astype(mx.float32)
        found = candidate.logits(candidate.body(inputs)).astype(mx.float32)
        if found.shape != expected.shape:
            return False
        return bool(mx.allclose(found, expected, rtol=1e-3, atol=1e-3).item())
    except (ValueError, TypeError, AttributeError):  # shapes or signatures that do not fit: not this one
        return False
    finally:
        module.weight = weight

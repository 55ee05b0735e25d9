"""Splits a language model into its body (tokens to hidden states) and its head (hidden states to logits).

The loss needs the head only at trained positions and a few rows at a time, but transformers' models compute both
in one call. What follows the projection (soft cap, scale) is tried from a short list, and taken only if it
reproduces the model's own logits; a model that fits nothing is run as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.engines.torch.documents import Documents, FlatBatch

Finish = Callable[[Tensor], Tensor]
_PROBE_SCALE = 64.0  # logits as large as this show a soft cap, which is invisible near zero


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection, and what follows it element by element."""

    path: str  # of the projection's module; empty where it cannot be taken apart
    module: nn.Module
    finish: Finish

    def project(self, hidden: Tensor) -> Tensor:
        """Raw logits [n, V] of hidden states [n, D]."""
        raw: Tensor = self.module(hidden)
        return raw

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that are trained."""
        return tuple(parameter for parameter in self.module.parameters() if parameter.requires_grad)


@dataclass(frozen=True, slots=True)
class SplitModel:
    """`body` gives hidden states; `head` makes logits of them."""

    module: nn.Module  # called with tokens, positions, documents, or a cache
    head: Head

    def body(self, flat: FlatBatch) -> Tensor:
        """Hidden states [N, D] of all documents."""
        return self.hidden(
            input_ids=flat.tokens, position_ids=flat.positions, documents=flat.documents, use_cache=False
        )[0]

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states [B, T, D] of any call that the model takes."""
        output = self.module(**inputs, return_dict=True)
        result: Tensor = output.logits if not self.head.path else output.last_hidden_state
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]."""
        return self.head.finish(self.head.project(hidden))


def split_model(model: Any) -> SplitModel:
    """The split that reproduces the logits of a transformers model, or the whole model with an empty head."""
    projection = model.get_output_embeddings()
    body = model.base_model
    if isinstance(projection, nn.Module) and body is not model:
        path = next(name for name, module in model.named_modules() if module is projection)
        for finish in _finishers(model.config):
            candidate = SplitModel(body, Head(path, projection, finish))
            if _reproduces(model, candidate):
                return candidate
    return unsplit(model)


def unsplit(model: nn.Module) -> SplitModel:
    """The whole model as a body, for a head that cannot be taken apart."""
    return SplitModel(model, Head("", nn.Identity(), _identity))


def _identity(raw: Tensor) -> Tensor:
    return raw


def _finishers(config: Any) -> Iterator[Finish]:
    """What architectures do to raw logits, by the key of their configuration that asks for it."""
    if cap := getattr(config, "final_logit_softcapping", None):
        yield lambda raw: torch.tanh(raw / cap) * cap
    if scale := getattr(config, "logit_scale", None):
        yield lambda raw: raw * scale
    if scaling := getattr(config, "logits_scaling", None):
        yield lambda raw: raw / scaling
    yield _identity


@torch.no_grad()
def _reproduces(model: Any, candidate: SplitModel) -> bool:
    """Compare on three tokens, with hidden states scaled up so that their logits are large."""
    device = next(model.parameters()).device
    tokens, positions = torch.tensor([[0, 1, 2]], device=device), torch.arange(3, device=device)[None]
    flat = FlatBatch(tokens, positions, Documents((3,)), positions[0], positions[0])
    enlarge = _Enlarged(candidate.head.project(candidate.body(flat)))
    handle = candidate.module.register_forward_hook(enlarge)
    try:  # with documents here too: another kernel would round differently
        whole = model(input_ids=tokens, position_ids=positions, documents=flat.documents, use_cache=False).logits[0]
        found = candidate.logits(candidate.body(flat))
    finally:
        handle.remove()
    tolerance = max(1e-3, 2 * torch.finfo(whole.dtype).eps)
    return found.shape == whole.shape and torch.allclose(found.float(), whole.float(), rtol=tolerance, atol=tolerance)


class _Enlarged:
    """A forward hook that multiplies the hidden states, so that the largest logit is about `_PROBE_SCALE`."""

    def __init__(self, raw: Tensor) -> None:
        self._factor = _PROBE_SCALE / max(float(raw.abs().max()), 1e-6)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * self._factor
        return output

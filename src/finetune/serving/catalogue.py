"""The models that requests can name: the base, and the adapters that are in memory with it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.generation.prompts import Prompter
from finetune.serving.errors import invalid, unknown_model


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name with what answers to it and how its prompts are made."""

    id: str
    prompter: Prompter
    root: str  # where it came from, as the operator or the client gave it
    adapter: str | None = None  # the engine's name for it; None is the base
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class Catalogue:
    """Used on the event loop alone."""

    def __init__(self, base: ServedModel, *, context_length: int | None) -> None:
        self.base = base
        self.context_length = context_length
        self._models = {base.id: base}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """What requests can name, the base first."""
        return tuple(self._models)

    def find(self, name: str) -> ServedModel:
        """Raises ApiError (404) for a name that is not served."""
        if name not in self._models:
            raise unknown_model(name, self.names)
        return self._models[name]

    def add(self, model: ServedModel) -> None:
        """Serve one more. Raises ApiError (400) where the name is taken."""
        if model.id in self._models:
            raise invalid(f"The name {model.id!r} is taken. Unload it first, or choose another.", "lora_name")
        self._models[model.id] = model

    def remove(self, name: str) -> ServedModel:
        """Stop serving an adapter. Raises ApiError: 404 for an unknown name, 400 for the base."""
        model = self.find(name)
        if model.adapter is None:
            raise invalid(f"{name!r} is the base model, which stays loaded.", "lora_name")
        return self._models.pop(name)

    def document(self, model: ServedModel) -> dict[str, Any]:
        """An entry of `/v1/models`."""
        return {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": "finetune",
            "root": model.root,
            "parent": model.parent,
            "max_model_len": self.context_length,
        }

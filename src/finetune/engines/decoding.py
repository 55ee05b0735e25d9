"""What decoding is in every engine: which requests make sense, and how much of a prompt is read at once."""

from collections.abc import Collection, Mapping
from typing import TypeVar

from finetune.core.errors import UsageError
from finetune.core.types import GenerationRequest

PREFILL_TOKENS = 512  # of a prompt that go through the model together

Value = TypeVar("Value")


def check_request(request: GenerationRequest, vocabulary: int) -> None:
    """Refuse what no model can decode, with a UsageError."""
    if not request.prompt:
        raise UsageError("The prompt has no tokens. Give at least one.")
    biased = [token for token, _ in request.sampling.logit_bias]
    for name, tokens in (("The prompt", request.prompt), ("logit_bias", biased)):
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise UsageError(
                f"{name} has token {unknown[0]}, and the model knows 0 to {vocabulary - 1}. Use its own tokenizer."
            )
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens = {request.max_tokens}: ask for at least one token.")


def adapter_called(name: str, loaded: Mapping[str, Value]) -> Value:
    """The loaded adapter of this name. Raises UsageError where there is none."""
    if name not in loaded:
        raise UsageError(f"No adapter is called {name!r}. Loaded adapters: {', '.join(loaded) or 'none'}.")
    return loaded[name]


def require_free_name(name: str, loaded: Collection[str]) -> None:
    """Raises UsageError where an adapter of this name is loaded."""
    if name in loaded:
        raise UsageError(f"An adapter is called {name!r} already. Unload it first, or choose another name.")

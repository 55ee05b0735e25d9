"""What the device did with memory, told in the project's errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.core.errors import TrainingError

_SIGNS = ("malloc", "memory", "allocate")


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn MLX's failure to allocate into a TrainingError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise TrainingError(
            f"Memory ran out: {str(error).strip() or 'allocation failed'}. Lower training.batch_size or "
            "training.max_batch_tokens or data.max_length, or set training.gradient_checkpointing: true."
        ) from None

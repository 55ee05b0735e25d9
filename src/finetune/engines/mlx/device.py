"""What the device did with memory, told in the project's errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.engines.memory import memory_ran_out

_SIGNS = ("malloc", "memory", "allocate")


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turn MLX's failure to allocate into a TrainingError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise memory_ran_out(str(error)) from None

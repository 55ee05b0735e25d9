"""Errors that a person can act on: what happened, the value and where it came from, what to do.

The command line prints the message and leaves with `exit_code`; it never shows a traceback for one of these.
"""

from collections.abc import Sequence


class FinetuneError(Exception):
    """Something that the person can put right. Exit code 1: the work was asked for properly and failed."""

    exit_code = 1


class UsageError(FinetuneError):
    """The request itself is wrong: an option, a configuration, a path. Exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """Every problem of a configuration, gathered and reported once."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source} has {count}:", *(f"  {line}" for line in problems)]))


class DataError(FinetuneError):
    """A data file cannot be used: missing, empty, unreadable, or too many bad rows."""


class ModelError(FinetuneError):
    """A model directory, its weights, its tokenizer or an adapter cannot be used."""


class CheckpointError(FinetuneError):
    """A checkpoint is damaged, missing, or does not belong to this run."""


class TrainingError(FinetuneError):
    """Training cannot go on: loss is not finite, memory or disk ran out."""


class OutOfMemory(TrainingError):  # noqa: N818 - as Python's own MemoryError, it says it all
    """There was no memory for an array."""


class StoppedBySignal(FinetuneError):  # noqa: N818 - it names an event, not a mistake
    """A run was stopped by a signal, after a checkpoint. Exit code 128 + signal number (130, 143)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number

"""PEFT's patterns: regular expressions that come with an adapter of whatever origin, matched within a limit of time."""

import re
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex

_LONGEST = 1000  # characters; PEFT writes names of modules, people write a line
SECONDS = 5.0  # of processor time for all patterns of an adapter: a hundred of them for a large model take 0.2
_A_NAME = re.compile(r"[\w.]+")


def is_pattern(text: Any) -> bool:
    """Whether it is a regular expression, for PEFT as for this project, of a length that somebody may have written."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        return False
    try:
        re.compile(text)
        _compiled(text)
    except (re.error, regex.error, RecursionError, OverflowError):
        return False
    return True


def matches(pattern: str, module: str, *, seconds: float | None = None) -> bool:
    """PEFT's rule: the pattern matches the end of the module's path. Raises TimeoutError after `seconds`."""
    return _compiled(pattern).match(module, timeout=seconds) is not None


def too_slow(patterns: Iterable[str], modules: Iterable[str]) -> list[str]:
    """A phrase about the pattern at which comparing each with each module took too long; nothing where all is well."""
    names, end = list(modules), time.process_time() + SECONDS
    for pattern in patterns:
        if _A_NAME.fullmatch(pattern):
            continue  # never slow, and some adapters have one for each module
        try:
            for module in names:
                matches(pattern, module, seconds=max(1e-3, end - time.process_time()))
        except TimeoutError:
            return [
                f"the pattern {pattern!r} takes more than {SECONDS:g} s to compare with the names of the modules. "
                "Name the modules themselves"
            ]
    return []


@lru_cache(maxsize=10_000)  # an adapter may have a pattern for each module
def _compiled(pattern: str) -> Any:
    return regex.compile(rf"(.*\.)?({pattern})$")

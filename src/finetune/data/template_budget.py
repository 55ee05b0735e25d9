"""What one rendering of a template may cost: rounds of its loops, and text and lists that it makes.

Bounds grow with what is rendered, so that no conversation is too long for an honest template.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.utils import Namespace

_ROUNDS = 1_000_000  # of all loops together
_ROUNDS_OF_A_CALL = 10  # which takes as long
_DEPTH = 100  # calls within calls
_VALUE = 2_000_000  # characters, or the like, of one value
_TOTAL = 50_000_000  # of all values that are made on the way
_PER_CHARACTER = {"rounds": 10, "value": 4, "total": 1_000}  # more for each character that is rendered
_DIGITS = 10_000  # of a number
_ENTRY = 48  # what an entry of a list costs beside its text: about its bytes

CONTAINERS = (list, tuple, dict, set, frozenset)


class TooCostlyError(jinja2.TemplateRuntimeError):
    """A template that would run long or fill the memory."""


class Budget:
    """What a rendering of `variables` may still cost."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._variables = variables
        self._input: int | None = None
        self._rounds = self._total = 0
        self.depth = 0

    def take_rounds(self, rounds: int) -> None:
        """Raises TooCostlyError where the loops of this rendering become too long."""
        self._rounds += rounds
        if self._rounds > _ROUNDS and self._rounds > (most := _ROUNDS + self._more("rounds")):
            raise TooCostlyError(f"its loops make more than {most:,} rounds")

    def take(self, size: int) -> None:
        """Account for a value of this size. Raises TooCostlyError where it, or all together, are too large."""
        if size > _VALUE and size > (most := self.most_of_a_value()):
            raise TooCostlyError(f"it makes a text or list of more than {most:,} characters")
        self._total += size
        if self._total > _TOTAL and self._total > (most := _TOTAL + self._more("total")):
            raise TooCostlyError(f"it makes more than {most:,} characters on the way")

    def most_of_a_value(self) -> int:
        """Characters that one value may have."""
        return _VALUE + self._more("value")

    def _more(self, kind: str) -> int:
        if self._input is None:
            self._input = _weight(self._variables, math.inf)
        return self._input * _PER_CHARACTER[kind]


_CURRENT: ContextVar[Budget] = ContextVar("budget of the rendering under way")


@contextmanager
def budget_for(variables: Mapping[str, Any]) -> Iterator[None]:
    """Renderings inside the block are held to a new budget."""
    token = _CURRENT.set(Budget(variables))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def take_rounds(rounds: int) -> None:
    """`Budget.take_rounds` of the rendering under way."""
    _CURRENT.get().take_rounds(rounds)


@contextmanager
def one_call() -> Iterator[None]:
    """A call of a macro or a method in the rendering under way. Raises TooCostlyError for too many or too deep ones."""
    budget = _CURRENT.get()
    budget.take_rounds(_ROUNDS_OF_A_CALL)
    if budget.depth >= _DEPTH:
        raise TooCostlyError(f"its macros call each other more than {_DEPTH} deep")
    budget.depth += 1
    try:
        yield
    finally:
        budget.depth -= 1


def take(size: int) -> None:
    """`Budget.take` of the rendering under way."""
    _CURRENT.get().take(size)


def charge(value: Any) -> Any:
    """The value itself, paid for; a list or mapping for all that it stands for, however often it holds the same."""
    if isinstance(value, str):
        take(len(value))
    elif isinstance(value, CONTAINERS):
        take(weight(value))
    return value


def as_text(value: Any) -> str:
    """`str(value)`, once it is known to be affordable."""
    if type(value) is not str:
        if not isinstance(value, str):
            take(weight(value))
        value = str(value)
    _CURRENT.get().take(len(value))
    return value  # type: ignore[no-any-return]


def weight(value: Any) -> int:
    """About the bytes of a value, and no less than the characters of its text. Counting stops where it is too much.

    What is held twice counts twice: a list of 60 lists, each twice in the next, has a text that no disk can hold.
    """
    return _weight(value, _CURRENT.get().most_of_a_value())


def _weight(value: Any, most: float) -> int:
    total, waiting = 0, [value]
    while waiting and total <= most:
        one = waiting.pop()
        total += _ENTRY
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, CONTAINERS):
            waiting += one
        elif isinstance(one, Namespace):
            raise TooCostlyError("it makes a text of a namespace")
    return total


def size_after(operator: str, left: Any, right: Any) -> int:
    """An upper bound for the size of what `left operator right` makes. Raises TooCostlyError for long numbers."""
    if isinstance(left, int) and isinstance(right, int):
        _refuse_long_number(operator, left, right)
        return 0
    sized = (str, list, tuple)
    if operator == "+":
        return _size(left) + _size(right) if isinstance(left, sized) and isinstance(right, sized) else 0
    if operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(items, sized) and isinstance(times, int):
                return _size(items) * max(0, times)
    if operator == "%" and isinstance(left, str):
        return len(left) + left.count("%") * weight(right)
    return 0


def _refuse_long_number(operator: str, left: int, right: int) -> None:
    bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}.get(operator, 0)
    if bits > _DIGITS * 10 // 3:
        raise TooCostlyError(f"`{operator}` makes a number of more than {_DIGITS:,} digits")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else weight(value)

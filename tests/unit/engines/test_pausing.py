"""Computations that stop on their way."""

from collections.abc import Callable

import pytest

from finetune.engines.torch.pausing import Pausing


def test_a_computation_goes_on_where_it_stopped_in_the_middle_of_calls() -> None:
    said = list[str]()

    def inner(pause: Callable[[], None]) -> int:
        said.append("one")
        pause()
        said.append("two")
        return 3

    pausing = Pausing(lambda pause: inner(pause) + 1)
    assert not pausing.go_on()
    said.append("between")
    assert pausing.go_on()
    assert (said, pausing.result) == (["one", "between", "two"], 4)


def test_one_computation_runs_while_another_is_half_done() -> None:
    def twice(pause: Callable[[], None]) -> str:
        pause()
        return "outer"

    outer, inner = Pausing(twice), Pausing(twice)
    assert [outer.go_on(), inner.go_on(), inner.go_on(), outer.go_on()] == [False, False, True, True]


def test_what_a_computation_raises_after_a_pause_reaches_who_lets_it_go_on() -> None:
    def failing(pause: Callable[[], None]) -> None:
        pause()
        raise MemoryError("no room")

    pausing = Pausing(failing)
    pausing.go_on()
    with pytest.raises(MemoryError, match="no room"):
        pausing.go_on()


def test_one_that_is_dropped_half_done_ends_at_once() -> None:
    ended = list[bool]()

    def compute(pause: Callable[[], None]) -> None:
        try:
            pause()
        finally:
            ended.append(True)

    pausing = Pausing(compute)
    pausing.go_on()
    del pausing
    assert ended

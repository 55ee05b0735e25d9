"""Listeners that fail."""

from finetune.core.events import CheckpointSaved, Event, Notice
from finetune.tracking.sinks import Broadcast

EVENT = CheckpointSaved(step=1, path="p")


def test_every_listener_hears_every_event_in_order():
    heard: list[tuple[int, Event]] = []
    emit = Broadcast([lambda event: heard.append((1, event)), lambda event: heard.append((2, event))])

    emit(EVENT)

    assert heard == [(1, EVENT), (2, EVENT)]


class Broken:
    """A sink whose disk is full."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _event: Event) -> None:
        self.calls += 1
        raise OSError("no space")


def test_a_listener_that_fails_is_named_once_and_the_others_go_on():
    heard: list[Event] = []
    broken = Broken()
    emit = Broadcast([broken, heard.append])

    emit(EVENT)
    emit(EVENT)

    notices = [event for event in heard if isinstance(event, Notice)]
    assert heard.count(EVENT) == 2
    assert len(notices) == 1
    assert "Broken" in notices[0].message
    assert "no space" in notices[0].message
    assert broken.calls == 3  # a disk that has room again is written to again

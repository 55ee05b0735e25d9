"""Hand each event to every listener. A listener that fails is named once, and never stops the training."""

from collections.abc import Sequence

from finetune.core.events import Event, Listener, Notice


class Broadcast:
    """One listener made of many. They are called in order, in the thread of the run."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        for index, listener in enumerate(self._listeners):
            self._tell(index, listener, event)

    def _tell(self, index: int, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception as error:  # whatever a sink does, the run goes on
            if index in self._failed:
                return
            self._failed.add(index)
            name = type(listener).__name__
            self(Notice(level="warning", message=f"{name} failed and its output may have gaps: {error}"))

"""The state of a conversation: who said what, and what is forgotten when the context is full."""

from collections.abc import Callable, Sequence

from finetune.core.errors import UsageError
from finetune.data.rows import Message


class ChatHistory:
    """A system message, if any, and the turns after it. Values go in and out; rendering is the template's work."""

    def __init__(self, system: str | None = None) -> None:
        self._system = system
        self._turns: list[Message] = []

    @property
    def messages(self) -> tuple[Message, ...]:
        """What the next prompt is rendered from."""
        head = () if self._system is None else (Message("system", self._system),)
        return (*head, *self._turns)

    def set_system(self, text: str | None) -> None:
        """Change or remove (None) the system message; the turns stay."""
        self._system = text

    def ask(self, text: str) -> None:
        """Add the person's turn."""
        self._turns.append(Message("user", text))

    def answer(self, text: str) -> None:
        """Add the model's turn."""
        self._turns.append(Message("assistant", text))

    def withdraw(self) -> None:
        """Take a question back that got no answer."""
        if self._turns and self._turns[-1].role == "user":
            self._turns.pop()

    def reset(self) -> None:
        """Forget the turns, keep the system message."""
        self._turns.clear()

    def fit(self, count: Callable[[Sequence[Message]], int], limit: int) -> int:
        """Forget the oldest exchanges until `count(messages)` tokens are below `limit`; returns how many.

        Raises UsageError where the last question alone is too long.
        """
        forgotten = 0
        while (length := count(self.messages)) >= limit:
            if len(self._turns) < 3:
                raise UsageError(
                    f"The message has {length:,} tokens with its template, and the model's context is {limit:,}, "
                    "which must also hold the answer. Shorten the message."
                )
            del self._turns[:2]
            forgotten += 1
        return forgotten

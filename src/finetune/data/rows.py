"""What a row is on its way from a file to a batch: an example (text) and an encoded row (tokens)."""

from dataclasses import dataclass, field
from typing import Any

from finetune.core.types import BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `tool_calls` is OpenAI's list, arguments as an object where they parse; `content` is "" for null."""

    role: str  # system, user, assistant, tool
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""  # the tool that answers, where the file says so
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands, for messages: `data.jsonl:17`."""

    file: str
    line: int  # 1-based; the row number where the format has no lines

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used, and why."""

    origin: Origin
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Example:
    """A supervised row in the one shape that everything after the readers sees.

    Either `messages` (a conversation; prompt/completion and Alpaca rows become one) or `text` (plain text).
    """

    origin: Origin
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    desirable: bool | None = None  # None: the row has no label
    fields: dict[str, str] = field(default_factory=dict)  # instruction/input for templates such as Alpaca's


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids with, for each, whether it is trained on (as a target). Lengths are equal.

    The first token is never a target, so its mask is False.
    """

    input_ids: IntArray
    loss_mask: BoolArray
    origin: Origin
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

"""Prompts from a file or a pipe: one a line as text, or JSON rows with `prompt` or `messages`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.data.blocks import decode_text
from finetune.data.conversations import RowError, parse_messages, parse_tools
from finetune.data.parsers import parse_json
from finetune.data.rows import Message, Origin
from finetune.generation.prompts import Prompter
from finetune.generation.requests import Prompt

_JSON = {".json", ".jsonl", ".ndjson"}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One thing to answer: a text, or a conversation that ends before the model's turn."""

    origin: Origin | None = None  # of a row of a file
    text: str = ""
    system: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def prompt(self, prompter: Prompter, *, system: str | None = None) -> Prompt:
        """What the model reads; `system` goes in front where the row has no system message of its own."""
        own = self.system if self.system is not None else system
        if not self.messages:
            return prompter.prompt(self.text, system=own)
        has_one = self.messages[0].role == "system"
        head = () if own is None or has_one else (Message("system", own),)
        return prompter.messages((*head, *self.messages), self.tools)


def read_prompts(path: Path) -> list[Asked]:
    """The prompts of a file: JSON rows where its name says so, else the lines that are not blank.

    Raises DataError where the file cannot be read, or with all rows that cannot be used.
    """
    try:
        text = decode_text(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a file of prompts, or - for a pipe.") from None
    return parse_prompts(path, text, as_json=path.suffix.lower() in _JSON)


def parse_prompts(path: Path, text: str, *, as_json: bool | None = None) -> list[Asked]:
    """The prompts of a text, which is called `path` in messages; None: JSON where its first line is a JSON object."""
    if _begins_with_object(text) if as_json is None else as_json:
        asked = _json_rows(path, text)
    else:
        lines = enumerate(text.splitlines(), start=1)
        asked = [Asked(Origin(str(path), number), line) for number, line in lines if line.strip()]
    if not asked:
        raise DataError(f"{path} has no prompt. Write one a line, or JSON rows with `prompt` or `messages`.")
    return asked


def _begins_with_object(text: str) -> bool:
    first = next((line for line in text.splitlines() if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_rows(path: Path, text: str) -> list[Asked]:
    asked, problems = [], []
    for line, value in parse_json(path, text):
        origin = Origin(str(path), line)
        try:
            asked.append(_row(origin, value))
        except RowError as error:
            problems.append(f"{origin}: {error}")
    if problems:
        raise DataError("\n  ".join([f"{path} has {len(problems)} rows that are no prompt:", *_first(problems)]))
    return asked


def _first(problems: Sequence[str]) -> list[str]:
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return [*problems[:_SHOWN], *more]


def _row(origin: Origin, value: Any) -> Asked:
    if isinstance(value, str):
        return Asked(origin, value)
    if not isinstance(value, dict) or (value.get("prompt") is None) == (value.get("messages") is None):
        raise RowError("the row needs either `prompt` (a text) or `messages`")
    for key in ("prompt", "system"):
        if not isinstance(value.get(key), str | None):
            raise RowError(f"`{key}` is not a text")
    system = value.get("system")
    if value.get("prompt") is not None:
        return Asked(origin, value["prompt"], system)
    messages = parse_messages(value["messages"])
    if messages[-1].role == "assistant":
        raise RowError("`messages` end with an answer: leave it out, it is the model's turn")
    return Asked(origin, "", system, messages, parse_tools(value.get("tools")))

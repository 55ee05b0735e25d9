"""The shape of a file's rows, and rows of any shape to examples.

The shape is found from the columns, once for a file. A column map gives known names to other columns first.
"""

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.core.errors import DataError, UsageError
from finetune.data.conversations import RowError, parse_messages, parse_tools
from finetune.data.readers import RawRow
from finetune.data.rows import Example, Message, Origin

CONVERSATIONS, ALPACA, PROMPT_COMPLETION, TEXT = "conversations", "alpaca", "prompt/completion", "text"
PREFERENCE = "chosen/rejected"

_CONVERSATION_KEYS = ("messages", "conversations", "conversation")
_PROMPT_KEYS = ("prompt", "question", "query", "problem", "input")
_ANSWER_KEYS = ("completion", "response", "answer", "output", "solution")
_EXTRA_KEYS = ("system", "history", "tools", "functions", "label")
KNOWN_FIELDS = (*_CONVERSATION_KEYS, "instruction", *_PROMPT_KEYS, *_ANSWER_KEYS, "text", *_EXTRA_KEYS)

_LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}


class LabelError(RowError):
    """A label that says neither desirable nor undesirable: it decides what is trained on, so it is never guessed."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rows of a file are. `description` is for people."""

    name: str
    description: str
    unused_columns: dict[str, int]  # column to number of rows that have it


def detect_shape(rows: Sequence[RawRow], columns: Mapping[str, str]) -> Shape:
    """The shape of most rows. Raises DataError for columns that nothing is known about, and for preference pairs."""
    _check_columns(rows, columns)
    mapped = [as_known(row.value, columns) for row in rows if isinstance(row.value, dict | str)]
    counts = Counter(_shape_of(value) for value in mapped)
    known = {name: count for name, count in counts.items() if name}
    file = rows[0].origin.file
    if not known:
        raise DataError(_unknown_shape(file, mapped))
    name = max(known, key=lambda shape: known[shape])
    if name == PREFERENCE:
        raise DataError(
            f"{file}: the rows are preference pairs (chosen, rejected), which need preference tuning; this version "
            "has supervised tuning. To train on the chosen answers, map them: data.columns: {completion: chosen}."
        )
    return Shape(name, _description(name, mapped), _unused(name, mapped))


def to_example(row: RawRow, shape: Shape, columns: Mapping[str, str]) -> Example:
    """One row as an example. Raises RowError with the reason where it cannot be used, LabelError for its label."""
    if not isinstance(row.value, dict | str):
        raise RowError("the row is no object")
    value = as_known(row.value, columns)
    if shape.name == TEXT:
        return _text_example(row.origin, value)
    if isinstance(value, str):
        raise RowError("the row is text, and the others are objects")
    fields: dict[str, str] = {}
    if shape.name == CONVERSATIONS:
        messages = parse_messages(next((value[key] for key in _CONVERSATION_KEYS if value.get(key)), []))
        messages = (*_system(value), *messages)
    elif shape.name == ALPACA:
        messages, fields = _alpaca(value)
    else:
        messages = _prompt_completion(value)
    _check_conversation(messages)
    tools = parse_tools(value.get("tools") or value.get("functions"))
    return Example(row.origin, tuple(messages), None, tools, parse_label(value.get("label")), fields)


def parse_label(label: Any) -> bool | None:
    """True and False in any of the usual spellings; None where a row has no label."""
    if label is None or label == "":
        return None
    text = str(int(label)) if isinstance(label, float) and label in {0.0, 1.0} else str(label).strip().lower()
    if text not in _LABELS:
        raise LabelError(
            f"the label {label!r} is none of {', '.join(_LABELS)}. If the column is the answer, "
            "map it: data.columns: {completion: label}"
        )
    return _LABELS[text]


def as_known(value: dict[str, Any] | str, columns: Mapping[str, str]) -> dict[str, Any] | str:
    """The row with known names for mapped columns; a mapped column hides one that has the name already."""
    if isinstance(value, str) or not columns:
        return value
    taken = set(columns.values())
    rest = {key: item for key, item in value.items() if key not in taken}
    if set(columns) & {*_PROMPT_KEYS, *_ANSWER_KEYS, "text", "instruction", *_CONVERSATION_KEYS}:
        # A map that says what the row is leaves no room for guessing from other columns.
        rest = {key: item for key, item in rest.items() if key in _EXTRA_KEYS or key not in KNOWN_FIELDS}
        rest = {key: item for key, item in rest.items() if key not in {"chosen", "rejected"}}
    return rest | {field: value[column] for field, column in columns.items() if column in value}


def _shape_of(value: dict[str, Any] | str) -> str:
    if isinstance(value, str):
        return TEXT
    if "chosen" in value and "rejected" in value:
        return PREFERENCE
    if any(isinstance(value.get(key), list) or _looks_like_list(value.get(key)) for key in _CONVERSATION_KEYS):
        return CONVERSATIONS
    has_answer = any(key in value for key in _ANSWER_KEYS)
    if "instruction" in value and has_answer:
        return ALPACA
    if has_answer and any(key in value for key in _PROMPT_KEYS):
        return PROMPT_COMPLETION
    return TEXT if "text" in value else ""


def _looks_like_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _used_keys(name: str, value: dict[str, Any]) -> set[str]:
    first = {
        CONVERSATIONS: [[key for key in _CONVERSATION_KEYS if value.get(key)]],
        ALPACA: [["instruction"], ["input"], [key for key in _ANSWER_KEYS if key in value]],
        PROMPT_COMPLETION: [[k for k in _PROMPT_KEYS if k in value], [k for k in _ANSWER_KEYS if k in value]],
        TEXT: [["text"]],
    }[name]
    extra = {"label"} if name == TEXT else set(_EXTRA_KEYS)
    return {keys[0] for keys in first if keys} | extra


def _unused(name: str, mapped: Sequence[dict[str, Any] | str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for value in mapped:
        if isinstance(value, dict):
            counts.update(value.keys() - _used_keys(name, value))
    return dict(sorted(counts.items()))


def _description(name: str, mapped: Sequence[dict[str, Any] | str]) -> str:
    first = next((v for v in mapped if isinstance(v, dict) and _shape_of(v) == name), None)
    if name == TEXT or first is None:
        return "plain text, trained in full"
    if name == ALPACA:
        return "instructions (Alpaca: instruction, input, output)"
    if name == PROMPT_COMPLETION:
        prompt = next(key for key in _PROMPT_KEYS if key in first)
        return f"requests and answers ({prompt}, {next(key for key in _ANSWER_KEYS if key in first)})"
    key = next(key for key in _CONVERSATION_KEYS if key in first)
    sharegpt = any(isinstance(v, dict) and "'from'" in repr(v.get(key))[:200] for v in mapped[:100])
    return f"conversations ({key}: {'from, value' if sharegpt else 'role, content'})"


def _text_example(origin: Origin, value: dict[str, Any] | str) -> Example:
    text = value if isinstance(value, str) else _text(value, "text")
    if not text.strip():
        raise RowError("the text is empty")
    label = None if isinstance(value, str) else parse_label(value.get("label"))
    return Example(origin, text=text, desirable=label)


def _alpaca(value: dict[str, Any]) -> tuple[tuple[Message, ...], dict[str, str]]:
    instruction, extra = _text(value, "instruction"), _text(value, "input")
    answer_key = next((key for key in _ANSWER_KEYS if key in value), "output")
    history = list[Message]()
    for pair in value.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(turn, str) for turn in pair):
            raise RowError("history is not a list of [request, answer] pairs")
        history += [Message("user", pair[0]), Message("assistant", pair[1])]
    request = f"{instruction}\n{extra}" if extra.strip() and instruction.strip() else instruction or extra
    answer = Message("assistant", _text(value, answer_key))
    fields = {"instruction": instruction, "input": extra} if instruction.strip() and extra.strip() else {}
    return (*_system(value), *history, Message("user", request), answer), fields


def _prompt_completion(value: dict[str, Any]) -> tuple[Message, ...]:
    prompt_key = next((key for key in _PROMPT_KEYS if key in value), "prompt")
    answer_key = next((key for key in _ANSWER_KEYS if key in value), "completion")
    return (
        *_system(value),
        *_side(value, prompt_key, "user"),
        *_side(value, answer_key, "assistant"),
    )


def _side(value: dict[str, Any], key: str, role: str) -> tuple[Message, ...]:
    """A request or an answer: text, or a list of messages."""
    if isinstance(value.get(key), list) and all(isinstance(turn, dict) for turn in value[key]):
        return parse_messages(value[key])
    return (Message(role, _text(value, key)),)


def _system(value: dict[str, Any]) -> tuple[Message, ...]:
    text = _text(value, "system")
    return (Message("system", text),) if text.strip() else ()


def _text(value: dict[str, Any], key: str) -> str:
    item = value.get(key)
    if item is None or (isinstance(item, float) and math.isnan(item)):
        return ""
    if isinstance(item, str):
        return item
    if isinstance(item, int | float):
        return str(item)
    raise RowError(f"{key} is {'a list' if isinstance(item, list) else 'an object'}, not text")


def _check_conversation(messages: Sequence[Message]) -> None:
    if not any(m.role == "assistant" and (m.content.strip() or m.tool_calls) for m in messages):
        raise RowError("the row has no answer: nothing that the assistant says")
    if not any(m.role != "assistant" for m in messages):
        raise RowError("the row has no request: nothing in front of the answer")
    if any(m.role == "user" and not m.content.strip() for m in messages):
        raise RowError("the request is empty")


def _check_columns(rows: Sequence[RawRow], columns: Mapping[str, str]) -> None:
    if not columns:
        return
    unknown = sorted(set(columns) - set(KNOWN_FIELDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], KNOWN_FIELDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"data.columns: {unknown[0]} is no known field.{meant} Known: {', '.join(KNOWN_FIELDS)}.")
    present = {key for row in rows if isinstance(row.value, dict) for key in row.value}
    missing = sorted(set(columns.values()) - present)
    if missing:
        raise DataError(
            f"{rows[0].origin.file}: data.columns names {', '.join(missing)}, which no row has. "
            f"The columns are: {', '.join(sorted(present)) or 'none (plain text)'}."
        )


def _unknown_shape(file: str, mapped: Sequence[dict[str, Any] | str]) -> str:
    keys = Counter(key for value in mapped if isinstance(value, dict) for key in value)
    found = ", ".join(key for key, _ in keys.most_common(12)) or "none: the rows are no objects"
    return (
        f"{file}: the rows have no answers that are known to be such. Their columns: {found}. Known shapes: messages "
        "or conversations; instruction, output; prompt, completion (or question, answer); text. "
        "For other names give a map, for example data.columns: {prompt: <column>, completion: <column>}."
    )

"""The shape of a file's rows, and rows of any shape to examples.

The shape is found from the columns, once for a file. A column map gives known names to other columns first.
"""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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


# The shape of a row, its columns, and the column of its conversation ("" for none): what a shape is found from.
Pattern: TypeAlias = tuple[str, tuple[str, ...], str]


@dataclass(slots=True)
class ShapeCounts:
    """How often each pattern occurs among rows. Counts of parts of a file add up to those of the file."""

    patterns: Counter[Pattern] = field(default_factory=Counter)  # of mapped rows, in the order of their first
    columns: set[str] = field(default_factory=set)  # of the file, before mapping
    from_value: set[str] = field(default_factory=set)  # conversation columns whose first turns have `from`, not `role`

    def count(self, values: Iterable[Any], columns: Mapping[str, str]) -> None:
        """Count some more rows, as a file has them."""
        for value in values:
            if isinstance(value, dict):
                self.columns.update(value)
            if isinstance(value, dict | str):
                self._count(as_known(value, columns))

    def _count(self, value: dict[str, Any] | str) -> None:
        if isinstance(value, str):
            self.patterns[TEXT, (), ""] += 1
            return
        conversation = next((key for key in _CONVERSATION_KEYS if value.get(key)), "")
        self.patterns[_shape_of(value), tuple(value), conversation] += 1
        if conversation and _begins_with_from(value[conversation]):
            self.from_value.add(conversation)

    def add(self, later: "ShapeCounts") -> None:
        """Count the rows of a later part too."""
        self.patterns.update(later.patterns)
        self.columns |= later.columns
        self.from_value |= later.from_value

    @property
    def most(self) -> str:
        """The shape of most rows; "" where none is known."""
        known: Counter[str] = Counter()
        for (name, _, _), count in self.patterns.items():
            if name:
                known[name] += count
        return max(known, key=lambda shape: known[shape]) if known else ""

    def shape(self, file: str, columns: Mapping[str, str]) -> Shape:
        """The shape of most rows. Raises DataError for columns that mean nothing known, and for preference pairs."""
        _check_columns(file, self.columns, columns)
        name = self.most
        if not name:
            raise DataError(_unknown_shape(file, self.patterns))
        if name == PREFERENCE:
            raise DataError(
                f"{file}: the rows are preference pairs (chosen, rejected), which need preference tuning; this version "
                "has supervised tuning. To train on the chosen answers, map them: data.columns: {completion: chosen}."
            )
        return Shape(name, self._description(name), self._unused(name))

    def _description(self, name: str) -> str:
        first = next((keys for shape, keys, _ in self.patterns if shape == name and keys), ())
        if name == TEXT or not first:
            return "plain text, trained in full"
        if name == ALPACA:
            return "instructions (Alpaca: instruction, input, output)"
        if name == PROMPT_COMPLETION:
            prompt = next(key for key in _PROMPT_KEYS if key in first)
            return f"requests and answers ({prompt}, {next(key for key in _ANSWER_KEYS if key in first)})"
        key = next(key for key in _CONVERSATION_KEYS if key in first)
        return f"conversations ({key}: {'from, value' if key in self.from_value else 'role, content'})"

    def _unused(self, name: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for (_, keys, conversation), count in self.patterns.items():
            for key in set(keys) - _used_keys(name, keys, conversation):
                counts[key] += count
        return dict(sorted(counts.items()))


def detect_shape(rows: Sequence[RawRow], columns: Mapping[str, str]) -> Shape:
    """The shape of most rows, which are those of one file. Raises as `ShapeCounts.shape`."""
    counts = ShapeCounts()
    counts.count((row.value for row in rows), columns)
    return counts.shape(rows[0].origin.file, columns)


def to_example(row: RawRow, shape: str, columns: Mapping[str, str]) -> Example:
    """One row as an example. Raises RowError with the reason where it cannot be used, LabelError for its label."""
    if not isinstance(row.value, dict | str):
        raise RowError("the row is no object")
    value = as_known(row.value, columns)
    if shape == TEXT:
        return _text_example(row.origin, value)
    if isinstance(value, str):
        raise RowError("the row is text, and the others are objects")
    fields: dict[str, str] = {}
    if shape == CONVERSATIONS:
        messages = parse_messages(next((value[key] for key in _CONVERSATION_KEYS if value.get(key)), []))
        messages = (*_system(value), *messages)
    elif shape == ALPACA:
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


def _begins_with_from(turns: Any) -> bool:
    return isinstance(turns, list) and isinstance(turns[0], dict) and "from" in turns[0]


def _looks_like_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _used_keys(name: str, present: Sequence[str], conversation: str) -> set[str]:
    first = {
        CONVERSATIONS: [[conversation]],
        ALPACA: [["instruction"], ["input"], [key for key in _ANSWER_KEYS if key in present]],
        PROMPT_COMPLETION: [[k for k in _PROMPT_KEYS if k in present], [k for k in _ANSWER_KEYS if k in present]],
        TEXT: [["text"]],
    }[name]
    extra = {"label"} if name == TEXT else set(_EXTRA_KEYS)
    return {keys[0] for keys in first if keys} | extra


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


def _check_columns(file: str, present: set[str], columns: Mapping[str, str]) -> None:
    if not columns:
        return
    unknown = sorted(set(columns) - set(KNOWN_FIELDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], KNOWN_FIELDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"data.columns: {unknown[0]} is no known field.{meant} Known: {', '.join(KNOWN_FIELDS)}.")
    missing = sorted(set(columns.values()) - present)
    if missing:
        raise DataError(
            f"{file}: data.columns names {', '.join(missing)}, which no row has. "
            f"The columns are: {', '.join(sorted(present)) or 'none (plain text)'}."
        )


def _unknown_shape(file: str, patterns: Mapping[Pattern, int]) -> str:
    keys: Counter[str] = Counter()
    for (_, names, _), count in patterns.items():
        for name in names:
            keys[name] += count
    found = ", ".join(key for key, _ in keys.most_common(12)) or "none: the rows are no objects"
    return (
        f"{file}: the rows have no answers that are known to be such. Their columns: {found}. Known shapes: messages "
        "or conversations; instruction, output; prompt, completion (or question, answer); text. "
        "For other names give a map, for example data.columns: {prompt: <column>, completion: <column>}."
    )

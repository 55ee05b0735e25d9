"""The part of Go's text/template that the Modelfiles use: fields, `range` over messages, and `if` with eq, gt, and."""

import re
from collections.abc import Sequence
from typing import Any

_ACTION = re.compile(r"{{(.*?)}}", re.DOTALL)
_WORD = re.compile(r'"[^"]*"|\(|\)|[^\s()]+')


def render(source: str, messages: Sequence[tuple[str, str]]) -> str:
    """The text for (role, content) pairs, as Ollama calls a template: a system text is also a variable."""
    parts = _ACTION.split(source)  # text, action, text, action, ..., text
    system = next((content for role, content in messages if role == "system"), "")
    root = {"System": system, "Messages": [{"Role": role, "Content": content} for role, content in messages]}
    text, end = _block(parts, 0, root, {"$": root})
    assert end == len(parts)
    return text


def _block(parts: Sequence[str], at: int, dot: Any, variables: dict[str, Any]) -> tuple[str, int]:
    """The text up to this block's `end`, and the place behind it."""
    text = ""
    while at < len(parts):
        text += parts[at]
        if at + 1 == len(parts):
            return text, len(parts)
        words = _WORD.findall(parts[at + 1])
        at += 2
        if words == ["end"]:
            return text, at
        if words[0] == "range":
            index, _element = words[1].rstrip(","), words[2]
            assert words[3] == ":="
            end = at
            for number, item in enumerate(_value(words[4:], dot, variables)):
                found, end = _block(parts, at, item, {**variables, index: number})
                text += found
            at = end
        elif words[0] == "if":
            found, at = _block(parts, at, dot, variables)
            text += found if _value(words[1:], dot, variables) else ""
        else:
            text += str(_value(words, dot, variables))
    return text, at


def _value(words: Sequence[str], dot: Any, variables: dict[str, Any]) -> Any:
    operands: list[Any] = []
    rest = list(words)
    name = rest.pop(0) if rest[0] in {"eq", "gt", "and"} else None
    while rest:
        word = rest.pop(0)
        if word == "(":
            close = rest.index(")")
            operands.append(_value(rest[:close], dot, variables))
            rest = rest[close + 1 :]
        else:
            operands.append(_operand(word, dot, variables))
    if name is None:
        return operands[0]
    left, right = operands
    return {"eq": left == right, "gt": name == "gt" and left > right, "and": bool(left) and bool(right)}[name]


def _operand(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1]
    if word.isdecimal():
        return int(word)
    head, _, field = word.partition(".")
    source = dot if head == "" else variables[head]
    return source[field] if field else source

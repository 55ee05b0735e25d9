"""Turns of a conversation as files write them, to messages.

OpenAI's `role` and `content` (text, null, or parts) with `tool_calls`, and ShareGPT's `from` and `value` with
function calls and observations. Whatever cannot be understood is a RowError with the reason.
"""

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.rows import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALL_ROLES = {"function_call", "tool_call"}
_TEXT_PARTS = {"text", "input_text", "output_text"}


class RowError(ValueError):
    """One row cannot be used. The message is the reason, without the place."""


def parse_messages(value: Any) -> tuple[Message, ...]:
    """A list of turns, or that list as a JSON string. Consecutive system messages stay as they are."""
    turns = _from_json(value, "the conversation") if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise RowError("the conversation is empty" if turns == [] else "the conversation is not a list of messages")
    # Of a generator, Python makes a tuple of ten and cuts it, and keeps 2,000 freed ones of each length: megabytes.
    return tuple([_message(turn, number) for number, turn in enumerate(turns, start=1)])


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is not an object")
    named = turn.get("role", turn.get("from"))
    if not isinstance(named, str) or named.lower() not in ROLES:
        raise RowError(f"message {number} has the role {named!r}; known: {', '.join(ROLES)}")
    content = turn.get("content") if "content" in turn else turn.get("value")
    if named.lower() in _CALL_ROLES:
        return Message("assistant", "", tuple(_calls(content, number)))
    calls = [_call(call, number) for call in _listed(turn.get("tool_calls"), f"tool_calls of message {number}")]
    if isinstance(turn.get("function_call"), dict):  # OpenAI's older form, one call
        calls.append(_call(turn["function_call"], number))
    text, from_parts = _content(content, number)
    reasoning = turn.get("reasoning_content") or turn.get("reasoning") or ""
    return Message(
        role=ROLES[named.lower()],
        content=_with_reasoning(text, reasoning if isinstance(reasoning, str) else ""),
        tool_calls=(*calls, *from_parts),
        name=turn["name"] if isinstance(turn.get("name"), str) else "",
        tool_call_id=turn["tool_call_id"] if isinstance(turn.get("tool_call_id"), str) else "",
    )


def _content(content: Any, number: int) -> tuple[str, list[dict[str, Any]]]:
    """The text of a message, and the calls that stand among its parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RowError(f"the content of message {number} is {_kind(content)}, not text")
    texts, reasoning = list[str](), list[str]()
    calls = list[dict[str, Any]]()
    for part in content:
        kind, value = _part(part, number)
        if kind in _TEXT_PARTS:
            texts.append(value)
        elif kind in {"reasoning", "thinking"}:
            reasoning.append(value)
        elif kind in _CALL_ROLES:
            calls.extend(_calls(value, number))
        else:
            raise RowError(f"message {number} has a part of type {kind!r}; only text can be trained on")
    return _with_reasoning("".join(texts), "\n".join(reasoning)), calls


def _part(part: Any, number: int) -> tuple[str, Any]:
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RowError(f"message {number} has a part without a type")
    value = next((part[key] for key in (kind, "text", "value", "content") if part.get(key) is not None), None)
    if kind in _TEXT_PARTS | {"reasoning", "thinking"} and not isinstance(value, str):
        raise RowError(f"message {number} has a part of type {kind!r} without text")
    return kind, value


def _with_reasoning(text: str, reasoning: str) -> str:
    """Reasoning in front of an answer, as models that reason write it."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text}" if reasoning.strip() else text


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    parsed = _from_json(value, f"the function call of message {number}") if isinstance(value, str) else value
    return [_call(call, number) for call in (parsed if isinstance(parsed, list) else [parsed])]


def _call(call: Any, number: int) -> dict[str, Any]:
    """One call in OpenAI's form. Arguments become an object where they parse, so that templates can print them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
        raise RowError(f"a function call of message {number} has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _object_or_text(arguments)
    normal: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
    return {"id": call["id"], **normal} if isinstance(call.get("id"), str) else normal


def _object_or_text(arguments: str) -> Any:
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions: a list, or a JSON string of one. Bare functions are put into OpenAI's wrapping."""
    tools = _listed(value, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a list of objects")
    return tuple([tool if "function" in tool else {"type": "function", "function": tool} for tool in tools])


def _listed(value: Any, what: str) -> list[Any]:
    parsed = _from_json(value, what) if isinstance(value, str) and value.strip() else value
    if not parsed:
        return []
    if isinstance(parsed, Mapping):
        return [parsed]
    if not isinstance(parsed, list):
        raise RowError(f"{what} is {_kind(parsed)}, not a list")
    return parsed


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"{what} is not valid JSON ({error})") from error


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), type(value).__name__)

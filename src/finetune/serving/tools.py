"""Tool calls in answers, for the formats that templates teach: Hermes and Qwen, Mistral, Llama 3."""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.generation.text import StopStrings

Call = dict[str, Any]  # {"name": ..., "arguments": {...}}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls: from `marker` on, in a text that `parse` reads (None: it is no call)."""

    marker: str
    parse: Callable[[str], list[Call] | None]
    visible: tuple[str, ...] = ()  # tokens that a decoder would leave out as special


def _hermes(text: str) -> list[Call] | None:
    parts = [part.partition("</tool_call>")[0] for part in text.split("<tool_call>")[1:]]
    return _calls([_loaded(part) for part in parts], "arguments")


def _mistral(text: str) -> list[Call] | None:
    content = text.removeprefix("[TOOL_CALLS]").strip()
    if content.startswith("["):
        listed = _loaded(content)
        return _calls(listed if isinstance(listed, list) else [], "arguments")
    named = [part.partition("[ARGS]") for part in content.split("[TOOL_CALLS]")]
    return _calls([{"name": name.strip(), "arguments": _loaded(value)} for name, _, value in named], "arguments")


def _llama(text: str) -> list[Call] | None:
    content = text.removeprefix("<|python_tag|>")
    whole = _calls([_loaded(content)], "parameters")
    return whole or _calls([_loaded(one) for one in content.split(";")], "parameters")


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(found: Sequence[Any], key: str) -> list[Call] | None:
    """None unless every one is a call."""
    calls = [
        {"name": call["name"], "arguments": call[key]}
        for call in found
        if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get(key), dict)
    ]
    return calls if calls and len(calls) == len(found) else None


HERMES = ToolFormat("<tool_call>", _hermes, ("<tool_call>", "</tool_call>"))
MISTRAL = ToolFormat("[TOOL_CALLS]", _mistral, ("[TOOL_CALLS]", "[ARGS]"))
LLAMA = ToolFormat("{", _llama)


def tool_format(template: Template) -> ToolFormat | None:
    """The format that a template shows its model; None where it is not one of the known ones."""
    source = template.source
    if "<tool_call>" in source:
        return HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<|python_tag|>" in source or ("ipython" in source and '"parameters"' in source):
        return LLAMA
    return None


class ToolReader:
    """Divides an answer into text, which goes out at once, and calls, which are known when it has ended."""

    def __init__(self, format: ToolFormat, names: frozenset[str]) -> None:
        self._format = format
        self._names = names
        self._before = StopStrings((format.marker,))
        self._text = ""
        self._space = ""  # white space that goes out only if text follows

    def add(self, piece: str) -> str:
        """Text that belongs to no call."""
        self._text += piece
        if self._before.found:
            return ""
        ready = self._space + self._before.add(piece)
        kept = ready.rstrip()
        self._space = ready[len(kept) :]
        return kept

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, as calls where it is calls, else as text."""
        if not self._before.found:
            return self._space + self._before.finish(), []
        rest = self._text[self._text.find(self._format.marker) :]
        calls = self._format.parse(rest.strip())
        if calls and all(call["name"] in self._names for call in calls):
            return "", calls
        return self._space + rest, []


def called(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Calls in OpenAI's form."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for call in calls
    ]


class MarkerDecoder:
    """Decodes as the tokenizer does, but shows the special tokens that open or divide calls."""

    def __init__(self, tokenizer: TextTokenizer, format: ToolFormat) -> None:
        self._tokenizer = tokenizer
        ids = {tokenizer.token_id(text): text for text in format.visible if text in tokenizer.special_tokens}
        self._markers = {token: text for token, text in ids.items() if token is not None}

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of the ids."""
        if self._markers.keys().isdisjoint(ids):
            return self._tokenizer.decode(ids, skip_special=skip_special)
        text, run = "", list[int]()
        for token in ids:
            if token in self._markers:
                text += self._tokenizer.decode(run, skip_special=skip_special) + self._markers[token]
                run = []
            else:
                run.append(token)
        return text + self._tokenizer.decode(run, skip_special=skip_special)

"""Where in a rendered conversation the assistant speaks, for any chat template.

A template may strip text, drop earlier reasoning, or move the system message, so looking for the answer's own
words is not enough. Instead each message is wrapped in marks that no text holds; if the rendering without the
marks is the true rendering, the marks stand exactly at the content's borders. A message whose content the
template inspects (so that marks would change the result) is left unwrapped and found between its neighbours.
From a content's border the span grows back to the end of the answer's header and on to the end-of-turn token.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.data.rows import Example
from finetune.data.sandbox import GENERATION_CLOSE, GENERATION_OPEN
from finetune.data.templates import Template, TemplateError, conversation_turns

_OPEN, _MIDDLE, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"{_OPEN}([0-9]+)([{_MIDDLE}{_CLOSE}])")
_RESERVED = re.compile("[\ufdd0-\ufdef]")

Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as the model will see it. `spans` are the character ranges that are trained on."""

    text: str
    spans: tuple[tuple[int, int], ...]
    needs_eos: bool  # the template ends the last answer with no token: EOS has to follow
    unseen_roles: tuple[str, ...] = ()  # roles whose content the template leaves out of the text


@dataclass(slots=True)
class _Place:
    """Where one message stands; None where the mark got lost."""

    start: int | None = None
    end: int | None = None
    call: bool = False  # the start is that of a tool call's name: text in front of it belongs to the answer

    def widen(self, start: int | None, end: int | None) -> None:
        if start is not None:
            self.start = start if self.start is None else min(self.start, start)
        if end is not None:
            self.end = end if self.end is None else max(self.end, end)


@dataclass(slots=True)
class _Marked:
    text: str
    places: dict[int, _Place] = field(default_factory=dict)


def render_example(template: Template, example: Example) -> RenderedRow:
    """Render a conversation and find its answers. Raises TemplateError where that cannot be done for certain."""
    turns = conversation_turns(example.messages, example.fields)
    if _RESERVED.search(repr(turns)):
        raise TemplateError("the row holds Unicode noncharacters (U+FDD0 to U+FDEF), which no text should")
    marked_text = template.render_turns(turns, example.tools, False)
    text = marked_text.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "")
    if GENERATION_OPEN in marked_text:
        spans = _generation_spans(template, marked_text)
        return _finished(template, turns, text, spans, unseen=())
    marked = _mark_messages(template, turns, example.tools, text)
    spans = [
        _answer_span(template, turns, example.tools, index, marked)
        for index, turn in enumerate(turns)
        if _speaks(turn)
    ]
    return _finished(template, turns, text, spans, unseen=_unseen_roles(turns, marked))


def _speaks(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _finished(
    template: Template, turns: Turns, text: str, spans: list[tuple[int, int]], unseen: tuple[str, ...]
) -> RenderedRow:
    ordered = sorted(spans)
    if any(left[1] > right[0] for left, right in zip(ordered, ordered[1:], strict=False)):
        raise _not_found(template, "two answers overlap")
    needs_eos = False
    if ordered and _speaks(turns[-1]):
        start, end = ordered[-1]
        needs_eos = not text[start:end].endswith(tuple(template.shape.closers) or ("\ufdd5",))
        text = text[:end] if needs_eos else text
    return RenderedRow(text, tuple(ordered), needs_eos, unseen)


def _generation_spans(template: Template, marked_text: str) -> list[tuple[int, int]]:
    """The template says itself where the assistant speaks; a token that ends the turn right behind is included."""
    spans, plain = [], ""
    for piece in re.split(f"(?=[{GENERATION_OPEN}{GENERATION_CLOSE}])", marked_text):
        if piece.startswith(GENERATION_OPEN):
            spans.append([len(plain), len(plain) + len(piece) - 1])
        plain += piece.strip(GENERATION_OPEN + GENERATION_CLOSE)
    for span in spans:
        behind = plain[span[1] :]
        closer = next((c for c in template.shape.closers if behind.lstrip().startswith(c)), None)
        if closer and not plain[span[0] : span[1]].rstrip().endswith(tuple(template.shape.closers)):
            span[1] += behind.index(closer) + len(closer)
    return [(start, end) for start, end in spans if end > start]


def _mark_messages(template: Template, turns: Turns, tools: Sequence[Mapping[str, Any]], text: str) -> _Marked:
    """Marks around every message that bears them: all at once where possible, else tried one by one."""
    everyone = range(len(turns))
    marked = _render_marked(template, turns, tools, everyone)
    if marked is not None and marked.text == text:
        return marked
    bearing = [
        index
        for index in everyone
        if (alone := _render_marked(template, turns, tools, [index])) is not None and alone.text == text
    ]
    marked = _render_marked(template, turns, tools, bearing)
    return marked if marked is not None and marked.text == text else _Marked(text)


def _render_marked(
    template: Template, turns: Turns, tools: Sequence[Mapping[str, Any]], which: Collection[int]
) -> _Marked | None:
    wrapped = [_wrapped(turn, index) if index in which else turn for index, turn in enumerate(turns)]
    try:
        return _without_marks(template.render_turns(wrapped, tools, False))
    except TemplateError:
        return None


def _wrapped(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The turn with marks inside the white space of its texts, so that stripping does not take them along."""
    marked = dict(turn)
    for key in ("content", "instruction", "input"):
        if turn.get(key):
            marked[key] = _wrap(turn[key], 2 * index)
    if turn.get("tool_calls"):
        marked["tool_calls"] = [_wrapped_call(call, 2 * index + 1) for call in turn["tool_calls"]]
    return marked


def _wrapped_call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": _wrap(function["name"], number)}}


def _wrap(text: str, number: int) -> str:
    core = text.strip()
    if not core:
        return text
    lead = text[: text.index(core)]
    return f"{lead}{_OPEN}{number}{_MIDDLE}{core}{_OPEN}{number}{_CLOSE}{text[len(lead) + len(core) :]}"


def _without_marks(marked_text: str) -> _Marked:
    pieces, places, length, last = [], dict[int, _Place](), 0, 0
    for mark in _MARK.finditer(marked_text):
        pieces.append(marked_text[last : mark.start()])
        length += len(pieces[-1])
        last = mark.end()
        number, opens = int(mark[1]), mark[2] == _MIDDLE
        place = places.setdefault(number, _Place(call=bool(number % 2)))
        place.widen(length if opens else None, None if opens else length)
    pieces.append(marked_text[last:])
    return _Marked("".join(pieces), places)


def _answer_span(
    template: Template, turns: Turns, tools: Sequence[Mapping[str, Any]], index: int, marked: _Marked
) -> tuple[int, int]:
    """The range of one answer: behind its header, up to and with the token that ends it."""
    content, calls = marked.places.get(2 * index, _Place()), marked.places.get(2 * index + 1, _Place())
    if turns[index].get("tool_calls") and calls.start is None and not _names_are_visible(turns[index], marked.text):
        raise TemplateError(f"the template `{template.name}` has no place for tool calls. chatml has: --template chatml")
    known = [at for at in (content.start, content.end, calls.start, calls.end) if at is not None]
    left, right = _neighbours(turns, index, marked, known)
    limit = min(known, default=right)
    start = _start(template, turns, tools, index, marked.text, left, limit, content.start)
    reach = max((at for at in (content.end, calls.end) if at is not None), default=start)
    return start, _end(template, marked.text, reach, right, ends_open=calls.start is not None or not known)


def _names_are_visible(turn: Mapping[str, Any], text: str) -> bool:
    return all(call["function"]["name"] in text for call in turn["tool_calls"])


def _neighbours(turns: Turns, index: int, marked: _Marked, known: Sequence[int]) -> tuple[int, int]:
    """The nearest borders of other messages on both sides: by place, or by order where the answer has no mark."""
    others = {number: place for number, place in marked.places.items() if number // 2 != index}
    if known:
        ends = [p.end for p in others.values() if p.end is not None and p.end <= min(known)]
        starts = [p.start for p in others.values() if p.start is not None and p.start >= max(known)]
    else:
        moved = {number for number in others if turns[number // 2]["role"] == "system"}  # may stand anywhere
        ends = [p.end for n, p in others.items() if p.end is not None and n // 2 < index and n not in moved]
        starts = [p.start for n, p in others.items() if p.start is not None and n // 2 > index and n not in moved]
    return max(ends, default=0), min(starts, default=len(marked.text))


def _start(
    template: Template,
    turns: Turns,
    tools: Sequence[Mapping[str, Any]],
    index: int,
    text: str,
    left: int,
    limit: int,
    content_start: int | None,
) -> int:
    header, closing = template.shape.header, template.shape.user_closing
    if header and (at := text.find(header, left, limit)) >= 0:
        return at + len(header)
    if content_start is not None:
        # Prompts end before a space that introduces the answer, so that the model writes it: train on it.
        return max(left, len(text[:content_start].rstrip(" ")))
    prompt = _prompt_before(template, turns, tools, index)
    if prompt and left <= len(prompt) <= limit and text.startswith(prompt):
        return len(prompt)
    if closing and text.startswith(closing, left) and left + len(closing) <= limit:
        return left + len(closing)
    raise _not_found(template, f"message {index + 1} has no place of its own in the text")


def _prompt_before(template: Template, turns: Turns, tools: Sequence[Mapping[str, Any]], index: int) -> str:
    try:
        return template.render_turns(turns[:index], tools, True)
    except TemplateError:
        return ""


def _end(template: Template, text: str, reach: int, right: int, *, ends_open: bool) -> int:
    """The end of the first closing token behind `reach`, else of the template's plain closing, else `reach`."""
    found = [
        (at, -len(token)) for token in template.shape.closers if (at := text.find(token, reach, right)) >= 0
    ]
    if found:
        at, minus_length = min(found)
        return at - minus_length
    plain = template.shape.turn_end
    if plain and (at := text.find(plain, reach, right)) >= 0:
        return at + len(plain)
    if not ends_open:
        return reach
    if right == len(text):
        return len(text.rstrip())
    raise _not_found(template, "an answer in the middle has no end")


def _unseen_roles(turns: Turns, marked: _Marked) -> tuple[str, ...]:
    if not marked.places:
        return ()
    hidden = {
        turn["role"]
        for index, turn in enumerate(turns)
        if turn["role"] != "assistant" and 2 * index not in marked.places and turn["content"].strip() not in marked.text
    }
    return tuple(sorted(hidden))


def _not_found(template: Template, why: str) -> TemplateError:
    return TemplateError(
        f"the template `{template.name}` does not show where the answers are ({why}). "
        "Mark them with {% generation %} ... {% endgeneration %} in a copy of the template."
    )

"""Where in a rendered conversation the assistant speaks, for any chat template.

A template may strip text, drop earlier reasoning, or move the system message, so looking for the answer's own
words is not enough. Instead each message is wrapped in marks that no text holds; if the rendering without the
marks is the true rendering, the marks stand exactly at the content's borders. A message whose content the
template inspects (so that marks would change the result) is left unwrapped and found between its neighbours.
From a content's border the span grows back to the end of the answer's header and on to the end-of-turn token.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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

    def widen(self, start: int | None, end: int | None) -> None:
        if start is not None:
            self.start = start if self.start is None else min(self.start, start)
        if end is not None:
            self.end = end if self.end is None else max(self.end, end)


_Places = dict[int, _Place]


@dataclass(slots=True)
class _Conversation:
    """A rendered conversation. `places` holds 2i for the content of message i, and 2i + 1 for its tool calls."""

    template: Template
    turns: Turns
    tools: Sequence[Mapping[str, Any]]
    text: str
    places: _Places


def render_example(template: Template, example: Example) -> RenderedRow:
    """Render a conversation and find its answers. Raises TemplateError where that cannot be done for certain."""
    turns = conversation_turns(example.messages, example.fields)
    rendered = template.render_turns(turns, example.tools, False)
    marks_itself = "endgeneration" in template.source and GENERATION_OPEN in rendered
    if _RESERVED.search(rendered) and not marks_itself:
        raise TemplateError("the row holds Unicode noncharacters (U+FDD0 to U+FDEF), which no text should")
    conversation = _Conversation(template, turns, example.tools, rendered, {})
    if marks_itself:
        _check_calls(conversation)
        text, spans = _generation_spans(template, rendered)
        return _finished(template, turns, text, spans, unseen=())
    conversation.places = _mark_messages(conversation)
    _check_calls(conversation)
    unseen = _unseen_roles(conversation)
    if "user" in unseen:
        raise TemplateError(f"the template `{template.name}` leaves out what the user says")
    spans = [_answer_span(conversation, index) for index, turn in enumerate(turns) if _speaks(turn)]
    _check_others_outside(conversation, spans)
    return _finished(template, turns, rendered, spans, unseen)


def _speaks(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _finished(
    template: Template, turns: Turns, text: str, spans: list[tuple[int, int]], unseen: tuple[str, ...]
) -> RenderedRow:
    ordered = sorted(spans)
    if any(left[1] > right[0] for left, right in itertools.pairwise(ordered)):
        raise _not_found(template, "two answers overlap")
    needs_eos = False
    if ordered and _speaks(turns[-1]):
        start, end = ordered[-1]
        needs_eos = not text[start:end].endswith(tuple(template.shape.closers) or ("\ufdd5",))
        text = text[:end] if needs_eos else text
    return RenderedRow(text, tuple(ordered), needs_eos, unseen)


def _generation_spans(template: Template, marked_text: str) -> tuple[str, list[tuple[int, int]]]:
    """The template says itself where the assistant speaks; a token that ends the turn right behind is included."""
    closers = tuple(template.shape.closers)
    starts, ends, plain = list[int](), list[int](), ""
    for piece in re.split(f"([{GENERATION_OPEN}{GENERATION_CLOSE}])", marked_text):
        if piece == GENERATION_OPEN:
            starts.append(len(plain))
        elif piece == GENERATION_CLOSE:
            ends.append(len(plain))
        else:
            plain += piece
    spans = []
    for start, end in zip(starts, ends, strict=True):
        behind = plain[end:]
        closer = next((token for token in closers if behind.lstrip().startswith(token)), "")
        open_end = bool(closer) and not plain[start:end].rstrip().endswith(closers)
        spans.append((start, end + behind.index(closer) + len(closer) if open_end else end))
    return plain, [(start, end) for start, end in spans if end > start]


def _mark_messages(conversation: _Conversation) -> _Places:
    """Marks around every message that bears them: all at once where possible, else tried one by one."""
    everyone = range(len(conversation.turns))
    places = _marked_places(conversation, everyone)
    if places is None:
        bearing = [index for index in everyone if _marked_places(conversation, [index]) is not None]
        places = _marked_places(conversation, bearing)
    return places or {}


def _marked_places(conversation: _Conversation, which: Collection[int]) -> _Places | None:
    """Where the marks of these messages come out; None where they change the text."""
    turns = [_wrapped(turn, index) if index in which else turn for index, turn in enumerate(conversation.turns)]
    try:
        text, places = _without_marks(conversation.template.render_turns(turns, conversation.tools, False))
    except TemplateError:
        return None
    return places if text == conversation.text else None


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


def _without_marks(marked_text: str) -> tuple[str, _Places]:
    pieces, places, length, last = list[str](), dict[int, _Place](), 0, 0
    for mark in _MARK.finditer(marked_text):
        pieces.append(marked_text[last : mark.start()])
        length += len(pieces[-1])
        last = mark.end()
        opens = mark[2] == _MIDDLE
        places.setdefault(int(mark[1]), _Place()).widen(length if opens else None, None if opens else length)
    pieces.append(marked_text[last:])
    return "".join(pieces), places


def _answer_span(conversation: _Conversation, index: int) -> tuple[int, int]:
    """The range of one answer: behind its header, up to and with the token that ends it."""
    content = conversation.places.get(2 * index, _Place())
    calls = conversation.places.get(2 * index + 1, _Place())
    known = [at for at in (content.start, content.end, calls.start, calls.end) if at is not None]
    left, right = _neighbours(conversation, index, known)
    content_leads = content.start is not None and content.start == min(known)
    start = _start(conversation, index, left, min(known, default=right), content_leads=content_leads)
    reach = max((at for at in (content.end, calls.end) if at is not None), default=start)
    ends_with_content = calls.end is None and content.end is not None
    return start, _end(conversation, reach, right, ends_with_content=ends_with_content)


def _neighbours(conversation: _Conversation, index: int, known: Sequence[int]) -> tuple[int, int]:
    """The nearest borders of other messages on both sides: by place, or by order where the answer has no mark."""
    others = [(number // 2, place) for number, place in conversation.places.items() if number // 2 != index]
    if known:
        ends = [place.end for _, place in others if place.end is not None and place.end <= min(known)]
        starts = [place.start for _, place in others if place.start is not None and place.start >= max(known)]
    else:
        ends, starts = _borders_beside(conversation, index)
    return max(ends, default=0), min(starts, default=len(conversation.text))


def _borders_beside(conversation: _Conversation, index: int) -> tuple[list[int], list[int]]:
    """For an answer without marks: where the messages right before and after it end and start, which must be known."""
    before = _end_before(conversation, index)
    after = conversation.places.get(2 * index + 2, _Place()).start
    last = index == len(conversation.turns) - 1
    if before is None or (after is None and not last):
        raise _not_found(conversation.template, f"message {index + 1} has no place of its own in the text")
    return [before], [] if after is None else [after]


def _end_before(conversation: _Conversation, index: int) -> int | None:
    """Where the message in front of this one ends; None where that is not known."""
    numbers = (2 * index - 2, 2 * index - 1)
    ends = [place.end for number in numbers if (place := conversation.places.get(number)) and place.end is not None]
    return max(ends, default=0 if index == 0 else None)


def _start(conversation: _Conversation, index: int, left: int, limit: int, *, content_leads: bool) -> int:
    """The end of the answer's header. `limit` is the first place that is known to belong to the answer."""
    text, shape = conversation.text, conversation.template.shape
    # Behind the message before, the first header counts. Where that border is not known, only the nearest one in
    # front of the answer's own words is certain: what a user wrote may look like a header.
    border_known = _end_before(conversation, index) is not None
    find = text.find if border_known else text.rfind
    for header in (shape.header, shape.short_header) if border_known or content_leads else ():
        if header.strip() and (at := find(header, left, limit)) >= 0:
            return at + len(header)
    if content_leads:
        # Prompts end before a space that introduces the answer, so that the model writes it: train on it.
        return max(left, len(text[:limit].rstrip(" ")))
    prompt = _prompt_before(conversation, index)
    if prompt and left <= len(prompt) <= limit and text.startswith(prompt):
        return len(prompt)
    if shape.user_closing and text.startswith(shape.user_closing, left) and left + len(shape.user_closing) <= limit:
        return left + len(shape.user_closing)
    raise _not_found(conversation.template, f"message {index + 1} has no place of its own in the text")


def _prompt_before(conversation: _Conversation, index: int) -> str:
    try:
        return conversation.template.render_turns(conversation.turns[:index], conversation.tools, True)
    except TemplateError:
        return ""


def _end(conversation: _Conversation, reach: int, right: int, *, ends_with_content: bool) -> int:
    """The end of the first closing token behind `reach`, else of the template's plain closing, else `reach`."""
    text, shape = conversation.text, conversation.template.shape
    found = [(at, -len(token)) for token in shape.closers if (at := text.find(token, reach, right)) >= 0]
    if found:
        at, minus_length = min(found)
        return at - minus_length
    if shape.turn_end and (at := text.find(shape.turn_end, reach, right)) >= 0:
        return at + len(shape.turn_end)
    if ends_with_content:
        return reach
    if right == len(text):
        return len(text.rstrip())
    raise _not_found(conversation.template, "an answer in the middle has no end")


def _check_calls(conversation: _Conversation) -> None:
    """A template that prints no tool calls would drop what the assistant does, in silence."""
    for index, turn in enumerate(conversation.turns):
        if not turn.get("tool_calls") or 2 * index + 1 in conversation.places:
            continue
        renamed = [{**call, "function": {**call["function"], "name": "qzcallqz"}} for call in turn["tool_calls"]]
        turns = [*conversation.turns]
        turns[index] = {**turn, "tool_calls": renamed}
        if "qzcallqz" not in conversation.template.render_turns(turns, conversation.tools, False):
            name = conversation.template.name
            raise TemplateError(f"the template `{name}` has no place for tool calls; chatml has (data.template)")


def _check_others_outside(conversation: _Conversation, spans: Sequence[tuple[int, int]]) -> None:
    """What users, tools and the system say is never trained on, wherever a template puts it."""
    for number, place in conversation.places.items():
        role = conversation.turns[number // 2]["role"]
        at = place.start if place.start is not None else place.end
        if role != "assistant" and at is not None and any(start < at < end for start, end in spans):
            raise _not_found(conversation.template, f"a {role} message stands inside one")


def _unseen_roles(conversation: _Conversation) -> tuple[str, ...]:
    hidden = {
        turn["role"]
        for index, turn in enumerate(conversation.turns)
        if 2 * index not in conversation.places
        and turn["content"].strip()
        and turn["content"].strip() not in conversation.text
    }
    return tuple(sorted(hidden))


def _not_found(template: Template, why: str) -> TemplateError:
    return TemplateError(
        f"the template `{template.name}` does not show where the answers are ({why}). "
        "Mark them with {% generation %} ... {% endgeneration %} in a copy of the template."
    )

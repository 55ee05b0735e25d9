"""What a chat template puts around an answer, learned from rendering small conversations.

No list of known templates: the header in front of an answer and the token behind it are read off the text.
"""

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from finetune.core.errors import DataError
from finetune.data.rows import Message

_ASK, _ANSWER, _ASK_AGAIN, _ANSWER_AGAIN = "qzaskqz", "qzsayqz", "qzasktwoqz", "qzsaytwoqz"
_ARGUMENT, _RESULT = "qzargumentqz", "qzresultqz"

Render = Callable[..., str]


@dataclass(frozen=True, slots=True)
class TemplateShape:
    """The text around an answer. All strings may be empty."""

    header: str  # opens an answer, e.g. "<|im_start|>assistant\n"
    short_header: str  # its part in front of reasoning, which earlier answers may lack
    missing_header: str  # a header that the template forgets in generation prompts: to be added there
    user_closing: str  # between a request and the header
    turn_end: str  # ends an answer in the middle or at the end of a conversation; "" where nothing does
    closers: frozenset[str]  # special tokens that may end an answer


def probe_template(render: Render, special_tokens: Set[str], eos_token: str | None) -> TemplateShape:
    """Render requests and answers made of marker words, and read the shape off the results."""
    ask, answer = Message("user", _ASK), Message("assistant", _ANSWER)
    prefix = _accepted_prefix(render, ask)
    without = render([*prefix, ask])
    with_header = render([*prefix, ask], generation_prompt=True)
    once = render([*prefix, ask, answer])
    again = (Message("user", _ASK_AGAIN), Message("assistant", _ANSWER_AGAIN))
    twice = _rendered(render, [*prefix, ask, answer, *again])
    closing = _after(without, _ASK)
    if with_header.startswith(without):
        header = with_header[len(without) :]
    else:  # the template ends a conversation without an answer in another way, e.g. with EOS
        header = closing = _after(with_header, _ASK)
    missing = _between(once, _ASK, _ANSWER).removeprefix(closing).rstrip(" ") if not header.strip() else ""
    tail = _after(once, _ANSWER)
    closers = (
        eos_token,
        _first_special(tail, special_tokens),
        _middle_closer(twice, header, special_tokens),
        _call_closer(render, prefix, special_tokens),
    )
    header = header if header.strip() else missing.strip() and missing
    return TemplateShape(
        header=header,
        short_header=_shared_start(header, _between(twice, _ASK, _ANSWER).removeprefix(closing)),
        missing_header=missing.strip() and missing,
        user_closing=closing,
        turn_end=_first_special(tail, special_tokens) or tail.strip(),
        closers=frozenset(token for token in closers if token),
    )


def _accepted_prefix(render: Render, ask: Message) -> list[Message]:
    """Some templates insist on a system message, and some refuse one."""
    try:
        render([ask])
    except DataError:
        return [Message("system", "qzrulesqz")]
    return []


def _rendered(render: Render, messages: Sequence[Message]) -> str:
    """The text, or "" where the template has no place for such a conversation."""
    try:
        return render(messages)
    except DataError:
        return ""


def _middle_closer(twice: str, header: str, special_tokens: Set[str]) -> str:
    """The special token that ends an answer which is not the last one; "" where there is none."""
    found = _first_special(_between(twice, _ANSWER, _ASK_AGAIN), special_tokens)
    opening = _specials(twice[: max(0, twice.find(_ASK))], special_tokens)[-1:]
    # The first special token behind an answer ends it, unless it is the one that opens a turn.
    return "" if found in {*opening, *_specials(header, special_tokens)} else found


def _call_closer(render: Render, prefix: Sequence[Message], special_tokens: Set[str]) -> str:
    """The special token at which a model waits for a tool's result; "" where there is none."""
    identity = "abcdefghi"  # Mistral's templates insist on nine letters
    function = {"name": "qzcallqz", "arguments": {"qzkeyqz": _ARGUMENT}}
    call = {"id": identity, "type": "function", "function": function}
    conversation = [
        *prefix,
        Message("user", _ASK),
        Message("assistant", "", (call,)),
        Message("tool", _RESULT, name="qzcallqz", tool_call_id=identity),
        Message("assistant", _ANSWER),
    ]
    return _first_special(_between(_rendered(render, conversation), _ARGUMENT, _RESULT), special_tokens)


def _shared_start(left: str, right: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(pair[0] for pair in same)


def _after(text: str, marker: str) -> str:
    return text[text.rfind(marker) + len(marker) :] if marker in text else ""


def _between(text: str, left: str, right: str) -> str:
    start, end = text.find(left), text.find(right)
    return text[start + len(left) : end] if 0 <= start < end else ""


def _first_special(text: str, special_tokens: Set[str]) -> str:
    found = _specials(text, special_tokens)
    return found[0] if found else ""


def _specials(text: str, special_tokens: Set[str]) -> list[str]:
    """The special tokens of a text in their order; of two at one place, the longer."""
    places = [(text.find(token), -len(token), token) for token in special_tokens if token in text]
    if not places:
        return []
    at, _, first = min(places)
    return [first, *_specials(text[at + len(first) :], special_tokens)]

"""Slot values: what a request names, such as a person, a title, a time or an amount.

`made_up` asks for words that nobody has seen, for most of the open slots: copying is then the only way to repeat them.
"""

import random
from collections.abc import Callable

from finetune.demo.words import made_up_word, words_of

SlotMaker = Callable[[random.Random, bool], str]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = ("miles", "kilometres", "metres", "yards", "feet", "inches", "centimetres", "millimetres")
ENDINGS = ("md", "txt", "csv", "pdf")
MADE_UP_RATE = 0.3


def _word(pool: str, rng: random.Random, made_up: bool) -> str:
    """A word of `pool`, or often a made-up one."""
    if made_up and rng.random() < MADE_UP_RATE:
        word = made_up_word(rng)
        return word.capitalize() if pool in ("names", "places") else word
    return rng.choice(words_of(pool))


def _name(rng: random.Random, made_up: bool) -> str:
    return _word("names", rng, made_up)


def _place(rng: random.Random, made_up: bool) -> str:
    return _word("places", rng, made_up)


def _noun(rng: random.Random, made_up: bool) -> str:
    return _word("nouns", rng, made_up)


def _title(rng: random.Random, made_up: bool) -> str:
    """Two words, such as `amber lantern`; where words may be made up, sometimes three."""
    words = [_word("nouns", rng, made_up) for _ in range(rng.choice((1, 1, 1, 2)) if made_up else 1)]
    return " ".join([_word("adjectives", rng, made_up), *words])


def _task(rng: random.Random, made_up: bool) -> str:
    """Something to do, such as `paint the fence`."""
    adjective = f"{_word('adjectives', rng, made_up)} " if rng.random() < 0.3 else ""
    return f"{_word('verbs', rng, made_up)} the {adjective}{_word('nouns', rng, made_up)}"


def _message(rng: random.Random, made_up: bool) -> str:
    """A short sentence without its full stop, such as `the ferry is late`."""
    noun, adjective = _word("nouns", rng, made_up), _word("adjectives", rng, made_up)
    return rng.choice((f"the {noun} is {adjective}", f"we need a {adjective} {noun}", f"I found the {noun}"))


def _item(rng: random.Random, made_up: bool) -> str:
    return _word("items", rng, made_up)


def _file(rng: random.Random, made_up: bool) -> str:
    """A file name, such as `amber-lantern.md`."""
    return f"{_word('adjectives', rng, made_up)}-{_word('nouns', rng, made_up)}.{rng.choice(ENDINGS)}"


def _time(rng: random.Random, made_up: bool) -> str:
    """A time of day on the 24-hour clock, such as `18:20`."""
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"


def _number(rng: random.Random, made_up: bool) -> str:
    return str(rng.randrange(2, rng.choice((30, 100, 1000))))


def _amount(rng: random.Random, made_up: bool) -> str:
    """An amount with two decimals, such as `12.45`; the last is not 0, so that JSON writes it alike."""
    return f"{rng.randrange(1, 300)}.{rng.randrange(10)}{rng.randrange(1, 10)}"


def _day(rng: random.Random, made_up: bool) -> str:
    return rng.choice(DAYS)


def _unit(rng: random.Random, made_up: bool) -> str:
    return rng.choice(UNITS)


SLOTS: dict[str, SlotMaker] = {
    "name": _name,
    "place": _place,
    "noun": _noun,
    "title": _title,
    "task": _task,
    "message": _message,
    "item": _item,
    "file": _file,
    "time": _time,
    "number": _number,
    "amount": _amount,
    "day": _day,
    "unit": _unit,
}


def kind_of(slot: str) -> str:
    """The kind of a slot: a trailing digit only tells two slots of one kind apart (`place2` is a place)."""
    return slot.rstrip("0123456789")


def fill(slots: tuple[str, ...], rng: random.Random, made_up: bool) -> dict[str, str]:
    """A value for each slot, all different."""
    while True:
        values = {slot: SLOTS[kind_of(slot)](rng, made_up) for slot in slots}
        if len(set(values.values())) == len(values):
            return values


_AROUND_IMPERATIVE = (
    "{Body}.",
    "{Body}.",
    "Please {body}.",
    "{Body}, please.",
    "Can you {body}?",
    "Could you please {body}?",
    "I need you to {body}.",
    "I would like you to {body}.",
    "Hey, {body}.",
    "Hi! Please {body}.",
    "{Body}. Thanks!",
)
_AROUND_SENTENCE = ("{body}", "{body}", "Hi! {body}", "{body} Thanks!")


def ask(body: str, rng: random.Random) -> str:
    """The request `body` with varying politeness around it.

    A body with a small first letter is an imperative without its full stop; one with a capital is whole.
    """
    around = _AROUND_SENTENCE if body[0].isupper() else _AROUND_IMPERATIVE
    return rng.choice(around).format(body=body, Body=capitalized(body))


def capitalized(text: str) -> str:
    """`text` with a capital first letter and the rest as it is."""
    return text[0].upper() + text[1:]

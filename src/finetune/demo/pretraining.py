"""Pre-training conversations: English requests answered in prose, and drills that teach copying and JSON.

The base model learns here to read a request and to repeat what it names. It never sees the demo's
tools, their output format, or a request of the demo's rows.
"""

import json
import random
import re
from collections.abc import Callable, Iterator

from finetune.demo.data import demo_requests
from finetune.demo.prose import INTENTS, STORIES, Intent
from finetune.demo.slots import SLOTS, ask, capitalized, fill
from finetune.demo.words import made_up_word, words_of

Messages = list[dict[str, str]]
_KEY_KINDS = ("name", "place", "noun", "title", "task", "item", "file", "time", "number", "amount", "day", "message")


def _turns(user: str, assistant: str, *, system: str | None = None) -> Messages:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _filled(text: str, values: dict[str, str]) -> str:
    return capitalized(text.format(**values))


def assistant_request(rng: random.Random) -> Messages:
    """A request as the demo has them, answered in a polite sentence."""
    intent = rng.choice(INTENTS)
    request, values = _request(intent, rng)
    return _turns(request, _filled(rng.choice(intent.replies), values))


def _request(intent: Intent, rng: random.Random) -> tuple[str, dict[str, str]]:
    values = fill(intent.slots, rng, made_up=True)
    return ask(rng.choice(intent.requests).format(**values), rng), values


def known_call(rng: random.Random) -> Messages:
    """A request answered by the function for it, which the model has to know by heart, if the system asks so."""
    intent = rng.choice(INTENTS)
    request, values = _request(intent, rng)
    fields = dict(zip(intent.keys, values.values(), strict=True))
    system, call = rng.choice(
        (
            ("Call a function.", f"{intent.function}({_as_arguments(fields)})"),
            ("Act.", f'{{"do":"{intent.function}","with":{_as_json(fields)}}}'),
        )
    )
    return _turns(request, call, system=system)


def story(rng: random.Random) -> Messages:
    """A story of a few sentences, and sometimes a question about it."""
    chosen = rng.choice(STORIES)
    values = fill(chosen.slots, rng, made_up=True)
    text = " ".join(_filled(sentence, values) for sentence in chosen.sentences)
    if rng.random() < 0.3:
        return _turns(ask(chosen.request.format(**values), rng), text)
    question, answer = rng.choice(chosen.questions)
    return _turns(f"{text} {_filled(question, values)}", _filled(answer, values))


def _fields(rng: random.Random, count: int) -> dict[str, str]:
    """Keys (words or made-up words, some joined by an underscore) with values of any kind."""
    keys: dict[str, str] = {}
    while len(keys) < count:
        parts = [_key_part(rng) for _ in range(rng.choice((1, 1, 2)))]
        keys["_".join(parts)] = SLOTS[rng.choice(_KEY_KINDS)](rng, True)
    return keys


def _key_part(rng: random.Random) -> str:
    pool = rng.choice(("made up", "nouns", "common"))
    return made_up_word(rng) if pool == "made up" else rng.choice(words_of(pool))


def _as_json(fields: dict[str, str]) -> str:
    typed = {key: _typed(value) for key, value in fields.items()}
    return json.dumps(typed, separators=(",", ":"))


def _typed(value: str) -> str | int | float:
    if value.isdigit():
        return int(value)
    return float(value) if re.fullmatch(r"\d+\.\d+", value) else value


def _as_arguments(fields: dict[str, str]) -> str:
    return ",".join(f'{key}="{value}"' for key, value in fields.items())


_FORMATS: dict[str, Callable[[dict[str, str]], str]] = {
    "JSON": _as_json,
    "a table": lambda fields: "\n".join(f"{key}|{value}" for key, value in fields.items()),
    "YAML": lambda fields: "\n".join(f"{key}: {value}" for key, value in fields.items()),
    "XML": lambda fields: "".join(f"<{key}>{value}</{key}>" for key, value in fields.items()),
    "arguments": _as_arguments,
}


def record(rng: random.Random) -> Messages:
    """Facts in English to be written in a named format."""
    fields = _fields(rng, rng.choice((1, 2, 2, 3)))
    facts = rng.choice((" and ", ", ", "; ")).join(
        rng.choice(("the {0} is {1}", "{0} is {1}", "{1} is the {0}")).format(*field) for field in fields.items()
    )
    name = rng.choice(list(_FORMATS))
    request = rng.choice(("write as {0}: {1}", "give me {0} where {1}", "make {0} from this: {1}")).format(name, facts)
    return _turns(ask(request, rng), _FORMATS[name](fields))


def lookup(rng: random.Random) -> Messages:
    """A record in some format and a question about one of its keys."""
    fields = _fields(rng, rng.choice((2, 2, 3)))
    key = rng.choice(list(fields))
    text = _FORMATS[rng.choice(list(_FORMATS))](fields)
    question = rng.choice(("What is the {0}?", "Give me the {0}.", "Which value has {0}?")).format(key)
    return _turns(f"{text}\n{question}", fields[key])


def repeat(rng: random.Random) -> Messages:
    """Words and values to be said again, plainly, between quotes, twice or as a list."""
    words = [_repeated(rng) for _ in range(rng.choice((1, 2, 3, 4, 6)))]
    text = " ".join(words)
    request, reply = rng.choice(_REPETITIONS)
    return _turns(ask(request.format(text), rng), reply.format(text, json.dumps(words, separators=(",", ":"))))


def _repeated(rng: random.Random) -> str:
    kind = rng.choice(("made up", "common", "value"))
    if kind == "value":
        return SLOTS[rng.choice(_KEY_KINDS)](rng, True)
    return made_up_word(rng) if kind == "made up" else rng.choice(words_of("common"))


_REPETITIONS = (
    ("repeat {0}", "{0}"),
    ("say {0}", "{0}"),
    ("write {0} in quotes", '"{0}"'),
    ("say {0} twice", "{0} {0}"),
    ("make a list of {0}", "{1}"),
)


def declared_call(rng: random.Random) -> Messages:
    """A call of a tool that the system message declares, with made-up names, in one of several notations."""
    intent = rng.choice(INTENTS)
    request, values = _request(intent, rng)
    keys = list(_fields(rng, len(values)))
    tool = f"{_key_part(rng)}_{_key_part(rng)}"
    fields = dict(zip(keys, values.values(), strict=True))
    notation, call = rng.choice(
        (
            ("call", f"{tool}({_as_arguments(fields)})"),
            ("array", json.dumps([tool, list(values.values())], separators=(",", ":"))),
            ("object", json.dumps({tool: fields}, separators=(",", ":"))),
            ("tag", f"<{tool}>{_FORMATS['XML'](fields)}</{tool}>"),
        )
    )
    system = f"Answer as {notation}: {tool}({', '.join(f'{k}={s}' for k, s in zip(keys, intent.slots, strict=True))})"
    return _turns(request, call, system=system)


_LESSONS: tuple[tuple[Callable[[random.Random], Messages], int], ...] = (
    (assistant_request, 30),
    (known_call, 25),
    (declared_call, 15),
    (record, 10),
    (lookup, 5),
    (repeat, 12),
    (story, 8),
)


def drills(seed: int) -> Iterator[Messages]:
    """The first lesson: repetition only, which is the fastest way to grow the heads that copy."""
    rng = random.Random(seed)
    while True:
        yield repeat(rng)


def conversations(seed: int) -> Iterator[Messages]:
    """All lessons mixed, without end and without the demo's own requests; the same seed gives the same ones."""
    rng = random.Random(seed)
    lessons, weights = zip(*_LESSONS, strict=True)
    held_out = demo_requests()
    while True:
        messages = rng.choices(lessons, weights)[0](rng)
        if messages[-2]["content"] not in held_out:
            yield messages

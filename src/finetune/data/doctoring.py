"""What is suspicious about rows that are well formed: each finding names the rows, and nothing is changed.

The rows are gone through several times and never held: digests of them are kept on the disk, and the words of those
that are listed.
"""

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.checks import opening, prompt_key, row_key
from finetune.data.columns import TEXTS, Positions, pieces_of, put, row_array, stored, where
from finetune.data.groups import KEYED, Keyed, keyed
from finetune.data.near import near_groups
from finetune.data.partition import Records
from finetune.data.rows import Example
from finetune.data.templates import Template, TemplateError
from finetune.data.tokenizer import TextTokenizer

_SHOWN = 40  # characters of a text in a finding
_NAMED = 3  # rows of a finding, where not everything is listed
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)  # templates leave them out of earlier answers on purpose


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows that belong to one suspicion, as places such as `data.jsonl:17`, and what shows it."""

    rows: tuple[str, ...]
    detail: str
    more: int = 0  # rows that belong to it too and are not named


@dataclass(frozen=True, slots=True)
class Found:
    """The first findings of a check, as many as were asked for (None: all), and how many there are."""

    count: int
    findings: tuple[Finding, ...]


def both_labels(examples: Iterable[Example], limit: int | None = None) -> Found:
    """The same request, labelled desirable and undesirable."""
    return _named(examples, _by(examples, prompt_key).conflicts(), limit)


def different_answers(examples: Iterable[Example], limit: int | None = None) -> Found:
    """The same request, with answers that differ; rows that are left out for their label do not count."""
    back = _by(examples, row_key).steps_back()
    requests = _by(examples, _whole_request, lambda row, example: not back[row] and _is_answered(example))
    return _named(examples, requests.of_several(), limit)


def exact_copies(examples: Iterable[Example], limit: int | None = None) -> Found:
    """Rows that are there several times."""
    return _named(examples, _by(examples, row_key).of_several(), limit)


def near_copies(examples: Iterable[Example], limit: int | None = None) -> Found:
    """Rows that are almost the same; of exact copies one takes part."""
    back = _by(examples, row_key).steps_back()
    rows = where(back, lambda steps: steps == 0)
    different = (_all_text(example) for row, example in enumerate(examples) if not back[row])
    return _named(examples, (rows[members] for members in near_groups(different)), limit)


def leaks(examples: Iterable[Example], held_out: Iterable[Example], limit: int | None = None) -> Found:
    """Validation rows whose request is trained on too, exactly or almost."""
    known = _asked_exactly(_keys(examples, prompt_key), _keys(held_out, prompt_key))
    _add_asked_almost(known, examples, held_out)
    rows = where(known, lambda numbers: numbers > 0)
    listed = rows[:limit]
    asked_at = _places(held_out, listed)
    known_at = _places(examples, known[listed] - 1)
    found = ((asked_at[row], known_at[int(known[row]) - 1]) for row in listed.tolist())
    return Found(len(rows), tuple(Finding((asked[0], trained[0]), asked[1]) for asked, trained in found))


def _asked_exactly(trained: Records, held_out: Records) -> Positions:
    """For each validation row the number of the first training row with its request, from 1; 0: there is none."""
    known, count = row_array(len(held_out), np.int64), len(trained)

    def both() -> Iterator[Records]:
        yield from pieces_of(trained)
        for part in pieces_of(held_out):
            yield keyed(part["row"] + count, part["key"])

    for part, groups in Keyed(both, count + len(held_out)):
        rows, first = part["row"], part["row"][groups.first[groups.of_row]]
        found = (rows >= count) & (first < count)
        put(known, rows[found] - count, first[found] + 1)
    return known


def _add_asked_almost(known: Positions, examples: Iterable[Example], held_out: Iterable[Example]) -> None:
    rest = where(known, lambda numbers: numbers == 0)
    count = 0

    def requests() -> Iterator[str]:
        nonlocal count
        for example in examples:
            count += 1
            yield _opening(example)
        yield from (_opening(example) for row, example in enumerate(held_out) if not known[row])

    for members in near_groups(requests()):
        new = members[members >= count] - count
        if len(new) < len(members):
            known[rest[new]] = members[0] + 1


def _by(
    examples: Iterable[Example],
    key: Callable[[Example], bytes],
    counts: Callable[[int, Example], bool] = lambda _row, _example: True,
) -> Keyed:
    """The rows that count, by a digest."""
    records = _keys(examples, key, counts)
    return Keyed(lambda: pieces_of(records), len(records))


def _keys(
    examples: Iterable[Example],
    key: Callable[[Example], bytes],
    counts: Callable[[int, Example], bool] = lambda _row, _example: True,
) -> Records:
    numbered = ((row, example) for row, example in enumerate(examples) if counts(row, example))
    return stored(_keyed(numbered, key), KEYED)


def _keyed(examples: Iterator[tuple[int, Example]], key: Callable[[Example], bytes]) -> Iterator[Records]:
    """The records of numbered rows, in pieces."""
    while some := list(itertools.islice(examples, TEXTS)):
        words = np.frombuffer(b"".join(key(example) for _, example in some), np.uint64).reshape(len(some), -1)
        labels = np.array([-1 if example.desirable is None else example.desirable for _, example in some], np.int8)
        yield keyed(np.array([row for row, _ in some]), words, labels)


def _is_answered(example: Example) -> bool:
    return example.text is None and example.desirable is not False


def _named(examples: Iterable[Example], groups: Iterable[Positions], limit: int | None) -> Found:
    """A finding for each of the first groups of rows: their places, and the request of the first.

    Half of a million rows may belong to one group: where only some groups are listed, only some of its rows are named.
    """
    count = itertools.count()
    counted = ((_first_of(rows, limit), len(rows)) for rows, _ in zip(groups, count, strict=False))
    listed = sorted(counted) if limit is None else heapq.nsmallest(limit, counted)
    at = _places(examples, itertools.chain.from_iterable(rows for rows, _ in listed))
    findings = (Finding(tuple(at[row][0] for row in rows), at[rows[0]][1], size - len(rows)) for rows, size in listed)
    return Found(next(count), tuple(findings))


def _first_of(rows: Positions, limit: int | None) -> tuple[int, ...]:
    return tuple(rows[: None if limit is None else _NAMED].tolist())


def _places(examples: Iterable[Example], rows: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Where these rows stand, and what they ask."""
    wanted = {int(row) for row in rows}
    found = ((row, example) for row, example in enumerate(examples) if row in wanted) if wanted else ()
    return {row: (str(example.origin), _request(example)) for row, example in found}


def _listed(findings: Iterable[Finding], limit: int | None) -> Found:
    coming = iter(findings)
    first = tuple(itertools.islice(coming, limit))
    return Found(len(first) + sum(1 for _ in coming), first)


def mangled(examples: Iterable[Example], template: Template, limit: int | None = None) -> Found:
    """Messages that the template does not show as they are: shortened, changed or left out."""
    return _listed((finding for example in examples for finding in _mangled(example, template)), limit)


def _mangled(example: Example, template: Template) -> Iterator[Finding]:
    if example.text is not None or example.fields:
        return  # a text needs no template, and one for instructions puts the parts elsewhere
    try:
        rendered = template.render(example.messages, example.tools)
    except TemplateError:
        return  # such a row is dropped and counted as unusable
    for message in example.messages:
        content = _THOUGHTS.sub("", message.content).strip()
        if content and content not in rendered:
            yield Finding((str(example.origin),), f"{message.role}: {_short(content)}")


def lossy(examples: Iterable[Example], tokenizer: TextTokenizer, limit: int | None = None) -> Found:
    """Texts that the tokens do not give back: characters that the vocabulary lacks, or that it changes."""
    found = ((example, _loss(example, tokenizer)) for example in examples)
    return _listed((Finding((str(example.origin),), loss) for example, loss in found if loss), limit)


def _loss(example: Example, tokenizer: TextTokenizer) -> str | None:
    """What the first text that is not given back comes to."""
    for text in _texts(example):
        back = tokenizer.decode(tokenizer.encode(text)[0].tolist(), skip_special=False)
        if back.strip() != text.strip():
            return _difference(text.strip(), back.strip())
    return None


def _texts(example: Example) -> Iterator[str]:
    if example.text is not None:
        yield example.text
    yield from (message.content for message in example.messages if message.content)


def _all_text(example: Example) -> str:
    return "\n".join(_texts(example))


def _opening(example: Example) -> str:
    """What `prompt_key` compares: everything in front of the first answer, or a text."""
    if example.text is not None:
        return example.text
    return "\n".join(message.content for message in opening(example))


def _whole_request(example: Example) -> bytes:
    """Equal for rows that differ in the last answer alone."""
    last = max((n for n, message in enumerate(example.messages) if message.role == "assistant"), default=None)
    return row_key(replace(example, messages=example.messages[:last], desirable=None))


def _request(example: Example) -> str:
    return _short(_opening(example))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"{line[:_SHOWN]}..." if len(line) > _SHOWN else line


def _difference(text: str, back: str) -> str:
    at = next(
        (n for n, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), min(len(text), len(back))
    )
    return f"{_short(text[at:])!r} comes back as {_short(back[at:])!r}"

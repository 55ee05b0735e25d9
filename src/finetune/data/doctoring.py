"""What is suspicious about rows that are well formed: each finding names the rows, and nothing is changed.

The rows are gone through several times and never held: of each, digests are kept, and the words of those that are
found.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.checks import opening, prompt_key, row_key
from finetune.data.groups import Digests, Groups, Positions, conflicting, group
from finetune.data.near import near_groups
from finetune.data.rows import Example
from finetune.data.templates import Template, TemplateError
from finetune.data.tokenizer import TextTokenizer

_SHOWN = 40  # characters of a text in a finding
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)  # templates leave them out of earlier answers on purpose


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows that belong to one suspicion, as places such as `data.jsonl:17`, and what shows it."""

    rows: tuple[str, ...]
    detail: str


def both_labels(examples: Iterable[Example]) -> list[Finding]:
    """The same request, labelled desirable and undesirable."""
    prompts = group(_digests(examples, prompt_key))
    labels = np.array([-1 if example.desirable is None else example.desirable for example in examples], np.int8)
    labelled = np.flatnonzero(labels >= 0)
    return _named(examples, [labelled[prompts.of_row[labelled] == number] for number in conflicting(prompts, labels)])


def different_answers(examples: Iterable[Example]) -> list[Finding]:
    """The same request, with answers that differ; rows that are left out for their label do not count."""
    counted = np.array([example.text is None and example.desirable is not False for example in examples], np.bool_)
    different = np.flatnonzero(counted & ~group(_digests(examples, row_key)).copies())
    requests = group(_digests(examples, _whole_request)[different])
    return _named(examples, [different[members] for members in _of_several(requests)])


def exact_copies(examples: Iterable[Example]) -> list[Finding]:
    """Rows that are there several times."""
    return _named(examples, _of_several(group(_digests(examples, row_key))))


def near_copies(examples: Iterable[Example]) -> list[Finding]:
    """Rows that are almost the same; of exact copies one takes part."""
    copies = group(_digests(examples, row_key)).copies()
    rows = np.flatnonzero(~copies)
    groups = near_groups(_all_text(example) for example, copy in zip(examples, copies, strict=True) if not copy)
    return _named(examples, [rows[members] for members in groups])


def leaks(examples: Iterable[Example], held_out: Iterable[Example]) -> list[Finding]:
    """Validation rows whose request is trained on too, exactly or almost."""
    sides = [_digests(examples, prompt_key), _digests(held_out, prompt_key)]
    count = len(sides[0])
    requests = group(np.concatenate(sides))
    asked = requests.of_row[count:]
    first = requests.first[asked]
    exact = first < count
    pairs = [(number, int(first[number])) for number in np.flatnonzero(exact).tolist()]
    rest = np.flatnonzero(~exact)
    unknown = (example for example, known in zip(held_out, exact, strict=True) if not known)
    for members in near_groups(_opening(example) for side in (examples, unknown) for example in side):
        known = [position for position in members if position < count]
        pairs += [(int(rest[position - count]), known[0]) for position in members if position >= count and known]
    asked_at = _places(held_out, {new for new, _ in pairs})
    known_at = _places(examples, {old for _, old in pairs})
    return [Finding((asked_at[new][0], known_at[old][0]), asked_at[new][1]) for new, old in pairs]


def _digests(examples: Iterable[Example], key: Callable[[Example], bytes]) -> Digests:
    """The first 128 bits for each row [rows, 2]."""
    return np.frombuffer(b"".join(key(example)[:16] for example in examples), np.uint64).reshape(-1, 2)


def _of_several(groups: Groups) -> list[Positions]:
    """The members of each group that has more than one, in the order of the first members."""
    order = np.argsort(groups.of_row, kind="stable")
    members = np.split(order, np.cumsum(groups.sizes())[:-1])
    return sorted((rows for rows in members if len(rows) > 1), key=lambda rows: int(rows[0]))


def _named(examples: Iterable[Example], groups: Sequence[Positions]) -> list[Finding]:
    """A finding for each group of rows: their places, and the request of the first."""
    at = _places(examples, {int(row) for rows in groups for row in rows})
    return [Finding(tuple(at[int(row)][0] for row in rows), at[int(rows[0])][1]) for rows in groups]


def _places(examples: Iterable[Example], wanted: set[int]) -> dict[int, tuple[str, str]]:
    """Where these rows stand, and what they ask."""
    found = ((row, example) for row, example in enumerate(examples) if row in wanted) if wanted else ()
    return {row: (str(example.origin), _request(example)) for row, example in found}


def mangled(examples: Iterable[Example], template: Template) -> list[Finding]:
    """Messages that the template does not show as they are: shortened, changed or left out."""
    found = []
    for example in examples:
        if example.text is not None or example.fields:
            continue  # a text needs no template, and one for instructions puts the parts elsewhere
        try:
            rendered = template.render(example.messages, example.tools)
        except TemplateError:
            continue  # such a row is dropped and counted as unusable
        for message in example.messages:
            content = _THOUGHTS.sub("", message.content).strip()
            if content and content not in rendered:
                found.append(Finding((str(example.origin),), f"{message.role}: {_short(content)}"))
    return found


def lossy(examples: Iterable[Example], tokenizer: TextTokenizer) -> list[Finding]:
    """Texts that the tokens do not give back: characters that the vocabulary lacks, or that it changes."""
    found = []
    for example in examples:
        for text in _texts(example):
            back = tokenizer.decode(tokenizer.encode(text)[0].tolist(), skip_special=False)
            if back.strip() != text.strip():
                found.append(Finding((str(example.origin),), _difference(text.strip(), back.strip())))
                break
    return found


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

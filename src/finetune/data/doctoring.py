"""What is suspicious about rows that are well formed: each finding names the rows, and nothing is changed."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from finetune.data.checks import conflicting_prompts, opening, prompt_key, repeated, row_key
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


def both_labels(examples: Sequence[Example]) -> list[Finding]:
    """The same request, labelled desirable and undesirable."""
    return [_finding(group, _request(group[0])) for group in conflicting_prompts(examples)]


def different_answers(examples: Sequence[Example]) -> list[Finding]:
    """The same request, with answers that differ; rows that are left out for their label do not count."""
    groups: dict[str, dict[str, Example]] = defaultdict(dict)
    for example in examples:
        if example.text is None and example.desirable is not False:
            groups[_whole_request(example)].setdefault(row_key(example), example)
    return [
        _finding(list(group.values()), _request(next(iter(group.values()))))
        for group in groups.values()
        if len(group) > 1
    ]


def exact_copies(examples: Sequence[Example]) -> list[Finding]:
    """Rows that are there several times."""
    copies: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        copies[row_key(example)].append(example)
    return [_finding(group, _request(group[0])) for group in copies.values() if len(group) > 1]


def near_copies(examples: Sequence[Example]) -> list[Finding]:
    """Rows that are almost the same; of exact copies one takes part."""
    left_out = set(repeated(examples))
    rows = [example for position, example in enumerate(examples) if position not in left_out]
    groups = near_groups([_all_text(example) for example in rows])
    return [_finding([rows[position] for position in group], _request(rows[group[0]])) for group in groups]


def leaks(examples: Sequence[Example], held_out: Sequence[Example]) -> list[Finding]:
    """Validation rows whose request is trained on too, exactly or almost."""
    trained = {prompt_key(example): example for example in reversed(examples)}
    found = [
        _finding([example, trained[prompt_key(example)]], _request(example))
        for example in held_out
        if prompt_key(example) in trained
    ]
    rest = [example for example in held_out if prompt_key(example) not in trained]
    rows = [*examples, *rest]
    for group in near_groups([_opening(example) for example in rows]):
        known = [rows[position] for position in group if position < len(examples)]
        new = [rows[position] for position in group if position >= len(examples)]
        found += [_finding([example, known[0]], _request(example)) for example in new if known]
    return found


def mangled(examples: Sequence[Example], template: Template) -> list[Finding]:
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


def lossy(examples: Sequence[Example], tokenizer: TextTokenizer) -> list[Finding]:
    """Texts that the tokens do not give back: characters that the vocabulary lacks, or that it changes."""
    found = []
    for example in examples:
        for text in _texts(example):
            back = tokenizer.decode(tokenizer.encode(text)[0].tolist(), skip_special=False)
            if back.strip() != text.strip():
                found.append(Finding((str(example.origin),), _difference(text.strip(), back.strip())))
                break
    return found


def _finding(examples: Sequence[Example], detail: str) -> Finding:
    return Finding(tuple(str(example.origin) for example in examples), detail)


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


def _whole_request(example: Example) -> str:
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

"""Any number of conversations, varied from real or generated ones: no two are equal."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIED = 10  # one word of so many is replaced


def write_conversations(path: Path, rows: int, *, source: Path, first: int = 0, most_characters: int = 1_700) -> None:
    """JSONL of `rows` conversations in the shape of those of `source`, which has one a line.

    `first` rows are left out before them, so that parts of a large file can be written one by one.
    Rows of the source with more characters are passed over, which sets the mean size.
    """
    rng = random.Random(0)
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if 0 < len(line) <= most_characters]
    words = sorted({word for line in lines for word in line.split(" ") if _is_plain(word)})
    patterns = [_pattern(line) for line in lines]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(itertools.islice(_lines(patterns, words, first + rows, rng), first, None))


def _lines(patterns: Sequence[list[str]], words: Sequence[str], rows: int, rng: random.Random) -> Iterator[str]:
    for number in range(rows):
        pieces = patterns[number % len(patterns)]
        chosen = rng.choices(words, k=len(pieces))
        chosen[-1] = f" (request {number})"
        yield "".join(part for pair in zip(pieces, chosen, strict=True) for part in pair) + '"}]}\n'


def _pattern(line: str) -> list[str]:
    """The text of a conversation in JSON, without its end, in pieces between which words go."""
    row = json.loads(line)
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["conversations"]]
    text = json.dumps({"conversations": turns}, ensure_ascii=False).removesuffix('"}]}')
    pieces, last = list[str](), 0
    places = [at for at, word in _words(text) if _is_plain(word)]
    for at in places[::VARIED]:
        pieces.append(text[last:at])
        last = at + len(text[at:].split(" ", 1)[0])
    return [*pieces, text[last:]]


def _words(text: str) -> Iterator[tuple[int, str]]:
    at = 0
    for word in text.split(" "):
        yield at, word
        at += len(word) + 1


def _is_plain(word: str) -> bool:
    return len(word) > 3 and word.isascii() and word.isalpha()

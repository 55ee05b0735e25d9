"""The text of a file to its rows, one function a format. Each row comes with its line, counted from 1.

Rows are yielded as they are read. What is wrong with a file is raised when all of it has been seen, so that every
line is named at once.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.data.blocks import Block, even_blocks, is_zipped, line_blocks, opened

Rows = Iterator[tuple[int, Any]]

_SHOWN = 5
_CONTAINERS = ("data", "rows", "train", "examples", "conversations", "items")
_END_OF_TEXT = "<|endoftext|>"
_PARQUET_ROWS = 250


@dataclass(slots=True)
class BrokenLines:
    """Lines that cannot be read: their number, and the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.merge(BrokenLines(1, [line]))

    def merge(self, later: "BrokenLines") -> None:
        self.count += later.count
        self.first += later.first[: _SHOWN - len(self.first)]

    def refuse(self, path: Path, advice: str) -> None:
        """Raise DataError if there are any."""
        if self.count:
            more = f"\n  and {self.count - _SHOWN:,} more" if self.count > _SHOWN else ""
            lines = "\n".join(f"  {problem}" for problem in self.first)
            count = "1 line" if self.count == 1 else f"{self.count:,} lines"
            raise DataError(f"{path}: {count} cannot be read. {advice}:\n{lines}{more}")


JSON_ADVICE = "Correct or delete them; every line must be one JSON object"


def parse_json(path: Path, text: str) -> list[tuple[int, Any]]:
    """The rows of a text that is in memory: an array, an object that holds one, or lines. `path` is for messages."""
    if text.lstrip().startswith("["):
        return list(array_rows(path, [text]))
    value = _object(text)
    if value is not None:
        return list(_with_key(text, value).rows(path))
    broken = BrokenLines()
    rows = list(_rows_of_lines(path, enumerate(text.split("\n"), start=1), broken))
    broken.refuse(path, JSON_ADVICE)
    return rows


def json_lines(path: Path, block: Block, broken: BrokenLines) -> Rows:
    """The rows of some lines of JSONL; lines that are not JSON go to `broken`."""
    return _rows_of_lines(path, block.lines(path), broken)


def _rows_of_lines(path: Path, lines: Iterable[tuple[int, str]], broken: BrokenLines) -> Rows:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            broken.add(f"{path}:{number}: invalid JSON ({error}): {start_of(line)}")


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A file that is one object. `key` is the name of the list that holds the rows; None: the object is the row."""

    text: str
    value: dict[str, Any]
    key: str | None

    def rows(self, path: Path) -> Rows:
        if self.key is None:
            return iter([(1, self.value)])
        found = re.search(rf'"{self.key}"\s*:\s*\[', self.text)
        start = found.end() - 1 if found else 0
        return array_rows(path, [self.text[start:]], line=1 + self.text.count("\n", 0, start))


def single_object(path: Path) -> JsonObject | None:
    """The file as one JSON object; None for JSONL. Only an object that spans lines is read whole to find out."""
    lines = _full_lines(path)
    start = list(itertools.islice(lines, 3))
    parsed = [_object(line) for line in start]
    if len(start) > 1 and (parsed[0] is not None or all(value is not None for value in parsed[1:])):
        return None
    text = start[0] if len(start) == 1 else "".join(block.text(path) for block in line_blocks(path))
    value = parsed[0] if len(start) == 1 else _object(text)
    if value is None:
        return None
    return _with_key(text, value)


def _with_key(text: str, value: dict[str, Any]) -> JsonObject:
    return JsonObject(text, value, next((name for name in _CONTAINERS if _holds_rows(value.get(name))), None))


def _full_lines(path: Path) -> Iterator[str]:
    return (line for block in line_blocks(path) for line in block.text(path).split("\n") if line.strip())


def _holds_rows(value: Any) -> bool:
    """A list of rows, and not the turns of one conversation."""
    turn_keys = ({"role", "content"}, {"from", "value"})
    objects = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    return objects and not any(keys <= value[0].keys() for keys in turn_keys)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def array_rows(path: Path, pieces: Iterable[str], *, line: int = 1) -> Rows:
    """The elements of an array, each with the line on which it starts. `pieces` begin with the bracket, at `line`."""
    window = _Window(path, iter(pieces), line)
    window.skip()
    if not window.stands_at("["):
        raise DataError(f"{path}:{line}: invalid JSON (expected [)")
    window.at += 1
    window.skip()
    while not window.stands_at("]"):
        starts_at = window.line()
        yield starts_at, window.value()
        window.skip()
        if window.stands_at(","):
            window.at += 1
            window.skip()
        elif not window.stands_at("]"):
            raise DataError(
                f"{path}:{window.line()}: invalid JSON (expected , or ] after an element). Is the file cut short?"
            )


class _Window:
    """The part of a JSON text that is being read. It grows to the size of one element, and slides."""

    _SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, path: Path, pieces: Iterator[str], line: int) -> None:
        self.at = 0
        self._path = path
        self._pieces = pieces
        self._text = ""
        self._line, self._counted = line, 0  # the line at a place of the text up to which line ends are counted
        self._decoder = json.JSONDecoder()

    def stands_at(self, character: str) -> bool:
        return self._text.startswith(character, self.at)

    def line(self) -> int:
        self._line += self._text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def skip(self) -> None:
        """Go on to what is not white space."""
        while True:
            found = self._SPACE.match(self._text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self._text) or not self._grow():
                return

    def value(self) -> Any:
        """The JSON value that stands here. Raises DataError with the line of what is wrong with it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
                if end < len(self._text) or not self._grow():  # a number may go on behind the last character
                    self.at = end
                    return value
            except (ValueError, RecursionError) as error:
                if _is_certain(error, len(self._text)) or not self._grow():
                    raise DataError(self._invalid(error)) from error

    def _invalid(self, error: Exception) -> str:
        at = self.line()
        if isinstance(error, json.JSONDecodeError):
            at += self._text.count("\n", self.at, error.pos)
        reason = getattr(error, "msg", str(error))
        return f"{self._path}:{at}: invalid JSON ({reason}): {start_of(self._text[self.at :])}"

    def _grow(self) -> bool:
        """Take in as much again as there is, and forget what has been read. False at the end of the file."""
        held = len(self._text) - self.at
        taken, size = list[str](), 0
        for piece in self._pieces:
            taken.append(piece)
            size += len(piece)
            if size >= held:
                break
        if not size:
            return False
        self.line()
        self._text, self.at, self._counted = "".join((self._text[self.at :], *taken)), 0, 0
        return True


def _is_certain(error: Exception, length: int) -> bool:
    """Whether a JSON text is wrong whatever follows it: not where it may only be cut off."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return error.pos < length - 16 and not error.msg.startswith("Unterminated string")


def array_pieces(path: Path) -> Iterator[str]:
    """The text of a file, in pieces."""
    return (block.text(path) for block in even_blocks(path))


def csv_delimiter(header: str) -> str:
    """The one that the header holds most of."""
    return max(",;\t|", key=header.count)


def csv_rows(path: Path, header: str) -> Rows:
    """`header`, the first line, then rows; quoted fields may hold line breaks."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_csv_lines(path), delimiter=csv_delimiter(header), strict=True)
    broken, line = BrokenLines(), 1
    names: list[str] = []
    try:
        for record in reader:
            start, line = line, reader.line_num + 1
            if not names:
                names = [name.strip() for name in record]
                _check_names(path, names, header)
            elif any(record) and len(record) != len(names):
                broken.add(f"{path}:{start}: {len(record)} fields where the header has {len(names)}")
            elif any(record) and not broken.count:
                yield start, dict(zip(names, record, strict=True))
    except csv.Error as error:
        broken.add(f"{path}:{reader.line_num}: {error}")
    broken.refuse(path, 'Put fields that hold the delimiter or a line break into "quotes"')


def _csv_lines(path: Path) -> Iterator[str]:
    return (line for block in line_blocks(path) for line in io.StringIO(block.text(path), newline=""))


def _check_names(path: Path, names: list[str], header: str) -> None:
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path}:1: the first line must name each column once, and is: {start_of(header)}")


TEXT_LINES = "text, one row a line"
TEXT_PARAGRAPHS = "text, one row a paragraph (empty lines between them)"
TEXT_DOCUMENTS = f"text, one row between {_END_OF_TEXT}"


def text_kind(path: Path) -> str:
    """Documents between <|endoftext|> marks, else paragraphs between empty lines, else one row a line."""
    begun, gap, paragraphs = False, False, False
    for block in line_blocks(path):
        text = block.text(path)
        if _END_OF_TEXT in text:
            return TEXT_DOCUMENTS
        for line in () if paragraphs else text.removesuffix("\n").split("\n"):
            if line.strip():
                paragraphs = paragraphs or gap
                begun = True
            elif begun and not line.strip(" \t"):
                gap = True
    return TEXT_PARAGRAPHS if paragraphs else TEXT_LINES


def text_rows(path: Path, kind: str) -> Rows:
    """The rows of plain text, without the white space around them."""
    if kind == TEXT_DOCUMENTS:
        return _stripped(_documents(path))
    lines = _numbered_lines(path)
    return _stripped(_paragraphs(lines) if kind == TEXT_PARAGRAPHS else lines)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    for block in line_blocks(path):
        text = block.text(path)
        yield from enumerate(text.removesuffix("\n").split("\n"), start=block.line)


def _paragraphs(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for blank, group in itertools.groupby(lines, key=lambda line: not line[1].strip(" \t")):
        if not blank:
            first, *rest = group
            yield first[0], "\n".join((first[1], *(line for _, line in rest)))


def _documents(path: Path) -> Iterator[tuple[int, str]]:
    line, kept = 1, list[str]()
    for block in line_blocks(path):
        *ended, last = block.text(path).split(_END_OF_TEXT)
        for piece in ended:
            document = "".join((*kept, piece))
            yield line, document
            line, kept = line + document.count("\n"), []
        kept.append(last)
    yield line, "".join(kept)


def _stripped(pieces: Iterator[tuple[int, str]]) -> Rows:
    for line, piece in pieces:
        if core := piece.strip():
            yield line + piece.count("\n", 0, len(piece) - len(piece.lstrip())), core


def parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file, counted from 1. Needs pyarrow, which is an optional dependency."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'finetune[parquet]'") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(_seekable(path)).iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def _seekable(path: Path) -> Path | io.BytesIO:
    if not is_zipped(path):
        return path
    with opened(path) as file:  # the directory of a Parquet file is at its end
        return io.BytesIO(file.read())


def start_of(text: str) -> str:
    """The beginning of a line, for messages."""
    line = text.split("\n", 1)[0]
    return line if len(line) <= 80 else f"{line[:77]}..."

"""The text of a file to its rows, one function a format. Each row comes with its line, counted from 1."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError

Rows = Sequence[tuple[int, Any]]

_SHOWN = 5
_SPACE = re.compile(r"[ \t\n\r]*")
_CONTAINERS = ("data", "rows", "train", "examples", "conversations", "items")
_END_OF_TEXT = "<|endoftext|>"


def parse_json(path: Path, text: str) -> tuple[str, Rows]:
    """A JSON array, an object that holds one, or JSONL: the first character and what follows it decide."""
    if text.lstrip().startswith("["):
        return "JSON array", _array_rows(path, text, text.index("["))
    whole = _single_object(text)
    if whole is None:
        return "JSONL", _json_lines(path, text)
    key = next((name for name in _CONTAINERS if _holds_rows(whole.get(name))), None)
    if key is None:
        return "JSON object", [(1, whole)]
    found = re.search(rf'"{key}"\s*:\s*\[', text)
    start = found.end() - 1 if found else 0
    return f'JSON object with the rows in "{key}"', _array_rows(path, text, start)


def _holds_rows(value: Any) -> bool:
    """A list of rows, and not the turns of one conversation."""
    turn_keys = ({"role", "content"}, {"from", "value"})
    objects = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    return objects and not any(keys <= value[0].keys() for keys in turn_keys)


def _single_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _json_lines(path: Path, text: str) -> Rows:
    rows: list[tuple[int, Any]] = []
    broken: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except ValueError as error:
            broken.append(f"{path}:{number}: invalid JSON ({error}): {_start_of(line)}")
    if broken:
        _refuse(path, broken, "Correct or delete them; every line must be one JSON object")
    return rows


def _array_rows(path: Path, text: str, start: int) -> Rows:
    """The elements of an array, each with the line on which it starts."""
    decoder = json.JSONDecoder()
    rows: list[tuple[int, Any]] = []
    position, line, counted = _skip(text, start + 1), 1, 0
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError as error:
            at = getattr(error, "lineno", line)
            reason = getattr(error, "msg", str(error))
            raise DataError(f"{path}:{at}: invalid JSON ({reason}): {_start_of(text[position:])}") from error
        rows.append((line, value))
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            at = text.count("\n", 0, position) + 1
            raise DataError(f"{path}:{at}: invalid JSON (expected , or ] after an element). Is the file cut short?")
    return rows


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def parse_csv(path: Path, text: str) -> tuple[str, Rows]:
    """A header line, then rows; quoted fields may hold line breaks. The delimiter is found from the header."""
    csv.field_size_limit(2**31 - 1)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Any]] = []
    broken: list[str] = []
    names: list[str] = []
    line = 1
    try:
        for record in reader:
            start, line = line, reader.line_num + 1
            if not names:
                names = [name.strip() for name in record]
            elif any(record) and len(record) != len(names):
                broken.append(f"{path}:{start}: {len(record)} fields where the header has {len(names)}")
            elif any(record):
                rows.append((start, dict(zip(names, record, strict=True))))
    except csv.Error as error:
        broken.append(f"{path}:{reader.line_num}: {error}")
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path}:1: the first line must name each column once, and is: {_start_of(header)}")
    if broken:
        _refuse(path, broken, 'Put fields that hold the delimiter or a line break into "quotes"')
    return "TSV" if delimiter == "\t" else "CSV", rows


def parse_text(path: Path, text: str) -> tuple[str, Rows]:
    """Documents between <|endoftext|> lines, else paragraphs between empty lines, else one row a line."""
    if _END_OF_TEXT in text:
        return f"text, one row between {_END_OF_TEXT}", _pieces(text, re.escape(_END_OF_TEXT))
    if re.search(r"\n[ \t]*\n", text.strip()):
        return "text, one row a paragraph (empty lines between them)", _pieces(text, r"\n[ \t]*\n")
    return "text, one row a line", _pieces(text, r"\n")


def _pieces(text: str, separator: str) -> Rows:
    rows: list[tuple[int, Any]] = []
    line, position = 1, 0
    for match in [*re.finditer(separator, text), None]:
        end = len(text) if match is None else match.start()
        piece = text[position:end]
        if piece.strip():
            lead = len(piece) - len(piece.lstrip())
            rows.append((line + piece.count("\n", 0, lead), piece.strip()))
        if match is not None:
            line += text.count("\n", position, match.end())
            position = match.end()
    return rows


def parse_parquet(path: Path, content: bytes) -> Rows:
    """Rows of a Parquet file, counted from 1. Needs pyarrow, which is an optional dependency."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'finetune[parquet]'") from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    return list(enumerate(table.to_pylist(), start=1))


def _refuse(path: Path, broken: Sequence[str], advice: str) -> None:
    more = f"\n  and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
    lines = "\n".join(f"  {problem}" for problem in broken[:_SHOWN])
    count = "1 line" if len(broken) == 1 else f"{len(broken):,} lines"
    raise DataError(f"{path}: {count} cannot be read. {advice}:\n{lines}{more}")


def _start_of(text: str) -> str:
    line = text.split("\n", 1)[0]
    return line if len(line) <= 80 else f"{line[:77]}..."

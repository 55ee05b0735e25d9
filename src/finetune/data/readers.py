"""From files to raw rows, each with the place it came from, in bounded memory.

JSON, JSONL (also under the name .json), CSV and TSV, plain text, Parquet, and gzip of those; a directory of them.
The content decides, not the name alone. A file that is not what it claims to be (a line that is not JSON, text
that is not UTF-8) is refused whole, with the lines: it is damaged, and what is missing cannot be counted.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from finetune.core.errors import DataError
from finetune.core.files import sha256_of
from finetune.data import parsers
from finetune.data.blocks import PARQUET_MAGIC, PIECE, SUFFIXES, Block, first_bytes, line_blocks, text_encoding
from finetune.data.parsers import BrokenLines, Rows
from finetune.data.rows import Origin

_MOST_ROWS = 250  # of a chunk of parsed rows


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it: an object, the text of a plain-text row, or whatever else JSON can hold."""

    origin: Origin
    value: Any


class ParsedRows(NamedTuple):
    """Some rows of a file, each with its line."""

    values: list[tuple[int, Any]]


# What is read at once and worked on by itself: parsed rows, or lines of JSONL, which are cheaper to hand over.
Chunk: TypeAlias = ParsedRows | Block


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file. `format` is what its content turned out to be; its rows are read again each time they are asked for."""

    path: Path
    format: str  # "JSONL", "JSON array", "CSV", ...
    encoding: str  # "UTF-8", "UTF-8 with BOM", "binary"
    sha256: str  # of the bytes on disk
    bytes: int  # on disk
    modified: int  # when it was opened: nanoseconds since 1970
    chunks: Callable[[], Iterator[Chunk]]

    def check_unchanged(self) -> None:
        """Raise DataError where the file is not the one that was opened."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: the file vanished while it was read ({error.strerror}).") from error
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self.modified):
            raise DataError(f"{self.path}: the file changed while it was read. Start again when it is complete.")

    def rows(self) -> Iterator[RawRow]:
        """All rows, in order. Raises DataError naming the file and, where there is one, the line."""
        broken = BrokenLines()
        for chunk in self.chunks():
            for line, value in rows_of(chunk, self.path, broken):
                yield RawRow(Origin(self.path.name, line), value)
        broken.refuse(self.path, parsers.JSON_ADVICE)


def rows_of(chunk: Chunk, path: Path, broken: BrokenLines) -> Rows:
    """The rows of a chunk with their lines; lines that cannot be read go to `broken`."""
    return parsers.json_lines(path, chunk, broken) if isinstance(chunk, Block) else iter(chunk.values)


def open_path(path: Path) -> list[SourceFile]:
    """A file, or every data file of a directory in the order of their names. Raises DataError."""
    return [open_file(file) for file in data_files(path)]


def data_files(path: Path) -> list[Path]:
    """The files that `path` stands for. Raises DataError where there is none, with near names."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
        if not files:
            raise DataError(f"{path}: the directory holds no data file ({', '.join(SUFFIXES)}, or those with .gz).")
        return files
    if not path.exists():
        raise DataError(_missing(path) if str(path).strip() else f"{str(path)!r}: a file without a name.")
    if not path.is_file():  # its end may never come, and it can be read only once
        raise DataError(f"{path}: this is no file but a device or a pipe. Put what it gives into a file first.")
    return [path]


def open_file(path: Path) -> SourceFile:
    """Find out what a file is. Raises DataError for one that is empty or cannot be read."""
    head = first_bytes(path)
    suffix = suffix_of(path)
    if head.startswith(PARQUET_MAGIC) or suffix == ".parquet":
        kind, encoding, chunks = "Parquet", "binary", _parsed(lambda: parsers.parquet_rows(path))
    else:
        encoding = text_encoding(path, head)
        kind, chunks = _text_format(path, suffix, head.decode("utf-8-sig", "replace").lstrip()[:1])
    try:
        stored = path.stat()
        return SourceFile(path, kind, encoding, sha256_of(path), stored.st_size, stored.st_mtime_ns, chunks)
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error


def suffix_of(path: Path) -> str:
    """The ending that says what a file is, without that of gzip."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _text_format(path: Path, suffix: str, begins: str) -> tuple[str, Callable[[], Iterator[Chunk]]]:
    """The format, by the name and the first character, and how it is read."""
    if suffix in {".csv", ".tsv"}:
        header = next(line_blocks(path)).text(path).split("\n", 1)[0]
        kind = "TSV" if parsers.csv_delimiter(header) == "\t" else "CSV"
        return kind, _parsed(lambda: parsers.csv_rows(path, header))
    if suffix in {".txt", ".text", ".md"} or (
        suffix not in {".json", ".jsonl", ".ndjson"} and begins not in {"{", "["}
    ):
        kind = parsers.text_kind(path)
        return kind, _parsed(lambda: parsers.text_rows(path, kind))
    if begins == "[":
        return "JSON array", _parsed(lambda: parsers.array_rows(path, parsers.array_pieces(path)))
    whole = parsers.single_object(path)
    if whole is None:
        return "JSONL", lambda: line_blocks(path)
    kind = "JSON object" if whole.key is None else f'JSON object with the rows in "{whole.key}"'
    return kind, _parsed(lambda: whole.rows(path))


def _parsed(rows: Callable[[], Rows]) -> Callable[[], Iterator[Chunk]]:
    return lambda: _in_chunks(rows())


def _in_chunks(rows: Rows) -> Iterator[ParsedRows]:
    """Chunks that together hold all rows: few enough that large ones stay small together."""
    while values := list(itertools.islice(rows, 1)):
        values += itertools.islice(rows, _rows_like(values[0][1]) - 1)
        yield ParsedRows(values)


def _rows_like(value: Any) -> int:
    """How many rows of this size make a chunk."""
    return max(1, min(_MOST_ROWS, PIECE // (1 + len(str(value)))))


def _is_data(file: Path) -> bool:
    return suffix_of(file) in SUFFIXES and not file.name.startswith(".")


def _missing(path: Path) -> str:
    import difflib

    if path.parts[:1] == ("hf:",):  # a Path makes one slash of two
        address = f"hf://{'/'.join(path.parts[1:])}"
        return (
            f"{address} is on the hub. `ft train` downloads it by itself; to look at it before, run "
            f"`ft dataset pull {address}` and give the files that it names."
        )
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: there is no such file, and no directory {folder}."
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    meant = f" Did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""
    return f"{path}: there is no such file.{meant}"

"""From files to raw rows, each with the place it came from.

JSON, JSONL (also under the name .json), CSV and TSV, plain text, Parquet, and gzip of those; a directory of them.
The content decides, not the name alone. A file that is not what it claims to be (a line that is not JSON, text
that is not UTF-8) is refused whole, with the lines: it is damaged, and what is missing cannot be counted.
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.data.parsers import parse_csv, parse_json, parse_parquet, parse_text
from finetune.data.rows import Origin

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text", ".md", ".parquet")
_GZIP_MAGIC, _PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it: an object, the text of a plain-text row, or whatever else JSON can hold."""

    origin: Origin
    value: Any


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file, read. `format` is what its content turned out to be."""

    path: Path
    format: str  # "JSONL", "JSON array", "CSV", ...
    encoding: str  # "UTF-8", "UTF-8 with BOM", "binary"
    sha256: str  # of the bytes on disk
    rows: tuple[RawRow, ...]


def read_path(path: Path) -> list[SourceFile]:
    """Read a file, or every data file of a directory in the order of their names. Raises DataError."""
    return [read_file(file) for file in data_files(path)]


def data_files(path: Path) -> list[Path]:
    """The files that `path` stands for. Raises DataError where there is none, with near names."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
        if not files:
            raise DataError(f"{path}: the directory holds no data file ({', '.join(SUFFIXES)}, or those with .gz).")
        return files
    if not path.exists():
        raise DataError(_missing(path))
    return [path]


def read_file(path: Path) -> SourceFile:
    """Read one file whole. Raises DataError naming the file and, where there is one, the line."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error
    content = _unzipped(path, stored)
    if not content.strip():
        raise DataError(f"{path}: the file is empty. It needs at least one row; see docs/data-formats.md.")
    kind, encoding, parsed = _parse(path, content)
    if not parsed:
        raise DataError(f"{path}: the file ({kind}) has no rows.")
    rows = tuple(RawRow(Origin(path.name, line), value) for line, value in parsed)
    return SourceFile(path, kind, encoding, hashlib.sha256(stored).hexdigest(), rows)


def _parse(path: Path, content: bytes) -> tuple[str, str, Sequence[tuple[int, Any]]]:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if content.startswith(_PARQUET_MAGIC) or suffix == ".parquet":
        return "Parquet", "binary", parse_parquet(path, content)
    text, encoding = decode_text(path, content)
    parsers: dict[str, Callable[[Path, str], tuple[str, Sequence[tuple[int, Any]]]]] = {
        ".csv": parse_csv,
        ".tsv": parse_csv,
        ".txt": parse_text,
        ".text": parse_text,
        ".md": parse_text,
    }
    looks_like_json = text.lstrip()[:1] in {"{", "["}
    default = parse_json if suffix in {".json", ".jsonl", ".ndjson"} or looks_like_json else parse_text
    kind, rows = parsers.get(suffix, default)(path, text)
    return kind, encoding, rows


def decode_text(path: Path, content: bytes) -> tuple[str, str]:
    """UTF-8 with or without a BOM; anything else is refused with line, byte and the way to convert it."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: the text is UTF-16, not UTF-8. {_convert(path, 'UTF-16')}")
    encoding = "UTF-8 with BOM" if content.startswith(b"\xef\xbb\xbf") else "UTF-8"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} (byte {error.start + 1:,} of the file) is not UTF-8; "
            f"the text may be Latin-1 or Windows-1252. {_convert(path, 'LATIN1')}"
        ) from error
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise DataError(f"{path}:{line}: NUL bytes: this is no text file. Known: {', '.join(SUFFIXES)}.")
    return text.replace("\r\n", "\n"), encoding


def _convert(path: Path, encoding: str) -> str:
    target = path.with_name(f"{path.stem}-utf8{path.suffix}").name
    return f"Convert it: iconv -f {encoding} -t UTF-8 {path} > {target}"


def _unzipped(path: Path, stored: bytes) -> bytes:
    if not stored.startswith(_GZIP_MAGIC):
        return stored
    try:
        return gzip.decompress(stored)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}). Copy or compress it again.") from error


def _is_data(file: Path) -> bool:
    return Path(file.name.removesuffix(".gz")).suffix.lower() in SUFFIXES and not file.name.startswith(".")


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

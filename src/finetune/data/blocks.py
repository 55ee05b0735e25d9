"""The bytes of a data file in pieces of bounded size, with the line and the byte at which each begins.

A piece is decoded by itself, so a file of any size is read in the same memory.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from finetune.core.errors import DataError

PIECE = 64 * 1024  # bytes: enough work to outweigh a hand-over to another process; a process holds several at a time
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text", ".md", ".parquet")
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class Readable(Protocol):
    """The part of a binary file that readers use."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; -1: all that is left."""
        ...


class Block(NamedTuple):
    """Bytes of a file, uncompressed. `line` and `byte` say where it begins, counted from 1 and from 0."""

    content: bytes
    line: int
    byte: int

    def text(self, path: Path) -> str:
        """As text with \\n for line ends. Raises DataError naming the line of what is not UTF-8 or not text."""
        try:
            text = self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(self._not_utf8(path, error.start)) from error
        if "\x00" in text:
            line = self.line + text.count("\n", 0, text.index("\x00"))
            raise DataError(f"{path}:{line}: NUL bytes: this is no text file. Known: {', '.join(SUFFIXES)}.")
        return text.replace("\r\n", "\n")

    def lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """Each line with its number. Raises as `text`.

        Each is decoded by itself: with one wide character a text takes two or four bytes for every character.
        """
        number, start = self.line, 0
        while start < len(self.content):
            end = self.content.find(b"\n", start) + 1 or len(self.content)
            yield number, Block(self.content[start:end], number, self.byte + start).text(path).removesuffix("\n")
            number, start = number + 1, end

    def _not_utf8(self, path: Path, at: int) -> str:
        line = self.line + self.content.count(b"\n", 0, at)
        return (
            f"{path}:{line}: byte 0x{self.content[at]:02x} (byte {self.byte + at + 1:,} of the file) is not UTF-8; "
            f"the text may be Latin-1 or Windows-1252. {_convert(path, 'LATIN1')}"
        )


def line_blocks(path: Path) -> Iterator[Block]:
    """Whole lines, together at most PIECE bytes, or more where one is longer."""
    line, byte, kept, held = 1, 0, list[bytes](), 0
    with opened(path) as file:
        while piece := file.read(PIECE - held % PIECE):
            cut = piece.rfind(b"\n") + 1
            held += len(piece)
            if not cut:
                kept.append(piece)
                continue
            content = b"".join((*kept, piece[:cut]))
            yield _without_mark(Block(content, line, byte))
            line, byte, held = line + content.count(b"\n"), byte + len(content), held - len(content)
            kept = [piece[cut:]]
    if last := b"".join(kept):
        yield _without_mark(Block(last, line, byte))


def even_blocks(path: Path) -> Iterator[Block]:
    """About PIECE bytes each, cut between characters wherever that is: for text whose lines may be endless."""
    line, byte, kept = 1, 0, b""
    for piece in _pieces(path):
        content = kept + piece
        cut = _last_border(content)
        content, kept = content[:cut], content[cut:]
        yield _without_mark(Block(content, line, byte))
        line, byte = line + content.count(b"\n"), byte + len(content)
    if kept:
        yield Block(kept, line, byte)


def first_bytes(path: Path) -> bytes:
    """The beginning, up to a piece that holds more than white space. Raises DataError for an empty file."""
    head = b""
    for piece in _pieces(path):
        head += piece
        if head.strip():
            return head
    raise DataError(f"{path}: the file is empty. It needs at least one row; see docs/data-formats.md.")


def text_encoding(path: Path, head: bytes) -> str:
    """`UTF-8` or `UTF-8 with BOM`. Raises DataError for UTF-16, with the way to convert it."""
    if head.startswith(_UTF16):
        raise DataError(f"{path}: the text is UTF-16, not UTF-8. {_convert(path, 'UTF-16')}")
    return "UTF-8 with BOM" if head.startswith(_BOM) else "UTF-8"


def decode_text(path: Path, content: bytes) -> str:
    """The text of a file that is in memory. Raises DataError for what is not UTF-8; `path` is for messages."""
    text_encoding(path, content)
    return _without_mark(Block(content, 1, 0)).text(path)


@contextmanager
def opened(path: Path) -> Iterator[Readable]:
    """The file, uncompressed as it is read. Raises DataError for what cannot be read or is damaged."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    with file:
        zipped = is_zipped(path)
        yield _Reader(path, gzip.GzipFile(fileobj=file) if zipped else file, zipped)


def is_zipped(path: Path) -> bool:
    """Whether the content is gzip, whatever the name. Raises DataError for what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: the file cannot be read ({error.strerror or error})."


@dataclass(frozen=True, slots=True)
class _Reader:
    path: Path
    file: Readable
    zipped: bool

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self.file.read(size)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and not self.zipped:
                raise DataError(_unreadable(self.path, error)) from error
            message = f"{self.path}: the gzip file is damaged ({error}). Copy or compress it again."
            raise DataError(message) from error


def _pieces(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        while piece := file.read(PIECE):
            yield piece


def _without_mark(block: Block) -> Block:
    if block.byte or not block.content.startswith(_BOM):
        return block
    return Block(block.content[len(_BOM) :], block.line, len(_BOM))


def _last_border(content: bytes) -> int:
    """Where the last whole character ends; a \\r waits for the \\n that may follow it."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte < 0x80:
            return len(content) - back + (byte != 0x0D)
        if byte >= 0xC0:
            return len(content) - back
    return len(content)


def _convert(path: Path, encoding: str) -> str:
    target = path.with_name(f"{path.stem}-utf8{path.suffix}").name
    return f"Convert it: iconv -f {encoding} -t UTF-8 {path} > {target}"

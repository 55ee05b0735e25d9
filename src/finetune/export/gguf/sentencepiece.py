"""Reads pieces and scores from `tokenizer.model`, a protocol buffer of SentencePiece, without its library.

ModelProto has the pieces in field 1; a piece has its text in field 1 and its score (a float) in field 2.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.core.errors import ModelError

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def read_scores(file: Path) -> Mapping[str, float]:
    """The score of each piece. Raises ModelError where the file is no SentencePiece model."""
    try:
        return dict(_piece(value) for field, value in _fields(file.read_bytes()) if field == 1)
    except (IndexError, ValueError, struct.error) as error:
        raise ModelError(f"{file} is not a whole SentencePiece model. Copy or download it again.") from error


def _piece(message: bytes) -> tuple[str, float]:
    found = dict(_fields(message))
    score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    return found.get(1, b"").decode("utf-8"), float(score)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of a message's fields; numbers themselves have none."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == _VARINT:
            _, end = _varint(message, place)
            yield key >> 3, b""
            place = end
            continue
        if kind == _LENGTH:
            length, place = _varint(message, place)
        elif kind in {_EIGHT_BYTES, _FOUR_BYTES}:
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + length > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place

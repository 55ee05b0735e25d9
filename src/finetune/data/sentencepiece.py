"""Reads `tokenizer.model`, a protocol buffer of SentencePiece, without its library.

Numbers of fields and defaults are those of sentencepiece_model.proto (https://github.com/google/sentencepiece).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from finetune.core.errors import ModelError

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_BPE = 2  # TrainerSpec.model_type


class TokenKind(IntEnum):
    """What a token is for, by SentencePiece's numbers, which are llama.cpp's too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """A token; its id is its place among the pieces."""

    text: str
    score: float
    kind: TokenKind


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """Pieces, and what becomes of a text before it is cut into them."""

    pieces: tuple[Piece, ...]
    is_bpe: bool
    byte_fallback: bool
    adds_space: bool  # in front of a text
    changes_text: bool  # beyond that: a table of characters, runs of spaces made one, spaces at the end of words


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Everything that encoding needs. Raises ModelError where the file is no SentencePiece model."""
    try:
        return _model(list(_fields(file.read_bytes())))
    except (IndexError, ValueError, struct.error, TypeError) as error:
        raise ModelError(f"{file} is not a whole SentencePiece model. Copy or download it again.") from error


def read_scores(file: Path) -> Mapping[str, float]:
    """The score of each piece. Raises ModelError where the file is no SentencePiece model."""
    return {piece.text: piece.score for piece in read_sentencepiece(file).pieces}


def _model(fields: list[tuple[int, Any]]) -> SentencePieceModel:
    pieces = tuple(_piece(value) for field, value in fields if field == 1)
    if not pieces:
        raise ValueError("no pieces")
    parts = dict(fields)
    trained, normalised = dict(_fields(parts.get(2, b""))), dict(_fields(parts.get(3, b"")))
    return SentencePieceModel(
        pieces,
        is_bpe=trained.get(3) == _BPE,
        byte_fallback=bool(trained.get(35, 0)),
        adds_space=bool(normalised.get(3, 1)),
        changes_text=bool(normalised.get(2)) or bool(normalised.get(4, 1)) or bool(trained.get(24, 0)),
    )


def _piece(message: bytes) -> Piece:
    found = dict(_fields(message))
    score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    return Piece(found.get(1, b"").decode("utf-8"), float(score), TokenKind(found.get(3, TokenKind.NORMAL)))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers of a message's fields, and what they hold: an int, or bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield key >> 3, value
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

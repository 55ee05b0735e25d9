"""A chunk of a file to arrays: parsed, checked, rendered, tokenised, masked. The work that other processes share.

What comes out depends on the chunk, the shape and the encoder alone, so any number of processes gives the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.core.types import BoolArray
from finetune.data.checks import prompt_key, row_key
from finetune.data.conversations import RowError
from finetune.data.formats import LabelError, ShapeCounts, to_example
from finetune.data.parsers import BrokenLines
from finetune.data.readers import Chunk, RawRow, rows_of
from finetune.data.rows import Example, Origin
from finetune.data.templates import Template
from finetune.data.token_store import IS_DIALOGUE, IS_REFUSED, IS_TEXT, ROLES, ROW, Table, TokenArray, token_type
from finetune.data.token_store import checksum as checksum_of
from finetune.data.tokenize import EncodedExample, encode_each
from finetune.data.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Encoder:
    """How rows become tokens."""

    template: Template
    tokenizer: TextTokenizer
    train_on_prompt: bool = False
    include_undesirable: bool = True  # False: rows labelled undesirable are left without tokens


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one file are understood. `shape` None: they are only looked at, to find their shape."""

    path: Path
    columns: Mapping[str, str]
    shape: str | None


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that something is wrong with. `at` is its line, or its place in the table where it has one."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """What there is in a chunk. Numbers and places count from its own beginning."""

    rows: int  # bad ones too
    shapes: ShapeCounts
    broken: BrokenLines
    table: Table
    ids: TokenArray
    mask: BoolArray
    problems: list[RowFault] = field(default_factory=list)  # by line
    unknown_labels: list[RowFault] = field(default_factory=list)  # by line
    refused: list[RowFault] = field(default_factory=list)  # by place in the table


def read_chunk(chunk: Chunk, reading: Reading, encoder: Encoder | None) -> ReadChunk:
    """Read a chunk, and encode its rows where there is an encoder. Raises DataError for text that is no text."""
    broken = BrokenLines()
    raw = list(rows_of(chunk, reading.path, broken))
    found = ReadChunk(
        len(raw),
        ShapeCounts.of((value for _, value in raw), reading.columns),
        broken,
        np.empty(0, ROW),
        *_no_tokens(encoder),
    )
    if reading.shape is None or broken.count:
        return found
    examples = list(_examples(raw, reading, reading.shape, found))
    table, ids, mask = _encoded(examples, encoder, found.refused)
    return ReadChunk(
        found.rows, found.shapes, broken, table, ids, mask, found.problems, found.unknown_labels, found.refused
    )


def _no_tokens(encoder: Encoder | None) -> tuple[TokenArray, BoolArray]:
    return np.empty(0, token_type(encoder.tokenizer.largest_id if encoder else 0)), np.empty(0, np.bool_)


def _examples(
    raw: Sequence[tuple[int, Any]], reading: Reading, shape: str, found: ReadChunk
) -> Iterator[tuple[int, Example]]:
    """The rows that can be used, with their numbers."""
    file = reading.path.name
    for number, (line, value) in enumerate(raw):
        try:
            yield number, to_example(RawRow(Origin(file, line), value), shape, reading.columns)
        except LabelError as error:
            found.unknown_labels.append(RowFault(line, str(error)))
        except RowError as error:
            found.problems.append(RowFault(line, str(error)))


def _encoded(
    examples: Sequence[tuple[int, Example]], encoder: Encoder | None, refused: list[RowFault]
) -> tuple[Table, TokenArray, BoolArray]:
    table = np.zeros(len(examples), ROW)
    for record, (number, example) in zip(table, examples, strict=True):
        _describe(record, number, example)
    if encoder is None:
        return table, *_no_tokens(None)
    wanted = [
        place
        for place, (_, example) in enumerate(examples)
        if encoder.include_undesirable or example.desirable is not False
    ]
    rows = encode_each(
        [examples[place][1] for place in wanted],
        template=encoder.template,
        tokenizer=encoder.tokenizer,
        train_on_prompt=encoder.train_on_prompt,
    )
    return table, *_placed(table, wanted, rows, encoder, refused)


def _describe(record: Any, number: int, example: Example) -> None:
    """Everything in a row's record that does not need its tokens."""
    text = example.text
    characters = len(text) if text is not None else sum(len(message.content) for message in example.messages)
    dialogue = [message.role for message in example.messages] != ["user", "assistant"] or bool(example.tools)
    record["trained_from"] = -1
    record["number"] = number
    record["line"] = example.origin.line
    record["characters"] = characters
    record["label"] = -1 if example.desirable is None else example.desirable
    record["flags"] = IS_TEXT if text is not None else IS_DIALOGUE * dialogue
    record["row"] = np.frombuffer(row_key(example), "<u8")[:2]
    record["prompt"] = np.frombuffer(prompt_key(example), "<u8")


def _placed(
    table: Table, places: Sequence[int], rows: Sequence[EncodedExample], encoder: Encoder, refused: list[RowFault]
) -> tuple[TokenArray, BoolArray]:
    """Tokens end to end; the records say where each row's are."""
    count, start = sum(len(row.ids) for row in rows), 0
    all_ids, all_masks = np.empty(count, _no_tokens(encoder)[0].dtype), np.empty(count, np.bool_)
    for place, row in zip(places, rows, strict=True):
        record = table[place]
        if row.refusal is not None:
            record["flags"] |= IS_REFUSED
            refused.append(RowFault(place, row.refusal))
            continue
        own = slice(start, start + len(row.ids))
        all_ids[own], all_masks[own] = row.ids, row.mask
        record["start"], record["length"] = start, len(row.ids)
        record["trained"] = np.count_nonzero(row.mask)
        record["trained_from"] = int(row.mask.argmax()) if row.mask.any() else -1
        record["checksum"] = checksum_of(all_ids[own], all_masks[own])
        record["unseen"] = sum(1 << ROLES.index(role) for role in row.unseen_roles)
        start = own.stop
    return all_ids, all_masks

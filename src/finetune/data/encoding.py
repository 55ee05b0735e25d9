"""A chunk of a file to arrays: parsed, checked, rendered, tokenised, masked. The work that other processes share.

What comes out depends on the chunk, the shape and the encoder alone, so any number of processes gives the same bits.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.core.types import BoolArray
from finetune.data.buffers import empty
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

_AT_ONCE = 16  # rows whose texts and tokens are held beside what there is of the chunk


@dataclass(frozen=True, slots=True)
class Encoder:
    """How rows become tokens."""

    template: Template
    tokenizer: TextTokenizer
    train_on_prompt: bool = False
    include_undesirable: bool = True  # False: rows labelled undesirable are left without tokens


class Reading(NamedTuple):
    """How the rows of one file are understood. `shape` None: they are only looked at, to find their shape."""

    path: Path
    columns: Mapping[str, str]
    shape: str | None


class RowFault(NamedTuple):
    """A row that something is wrong with. `at` is its line, or its place in the table where it has one."""

    at: int
    reason: str


class ReadChunk(NamedTuple):
    """What there is in a chunk. Numbers and places count from its own beginning."""

    rows: int  # bad ones too
    shapes: ShapeCounts
    broken: BrokenLines
    table: Table
    ids: TokenArray
    mask: BoolArray
    problems: Sequence[RowFault] = ()  # by line
    unknown_labels: Sequence[RowFault] = ()  # by line
    refused: Sequence[RowFault] = ()  # by place in the table


def read_chunk(chunk: Chunk, reading: Reading, encoder: Encoder | None) -> ReadChunk:
    """Read a chunk, and encode its rows where there is an encoder. Raises DataError for text that is no text."""
    broken, found = BrokenLines(), _Found(reading, encoder)
    rows = rows_of(chunk, reading.path, broken)
    while some := list(itertools.islice(rows, _AT_ONCE)):
        found.add(some)
    return found.chunk(broken)


class _Found:
    """What there is in the rows of a chunk so far. Of their texts nothing is kept."""

    def __init__(self, reading: Reading, encoder: Encoder | None) -> None:
        self._reading = reading
        self._encoder = encoder
        self._shapes = ShapeCounts()
        self._tables = [np.empty(0, ROW)]
        ids, mask = _no_tokens(encoder)
        self._ids, self._masks = [ids], [mask]
        self._rows = self._places = self._tokens = 0
        self._problems, self._unknown_labels, self._refused = (list[RowFault]() for _ in range(3))

    def add(self, raw: Sequence[tuple[int, Any]]) -> None:
        """Some more rows, each with its line."""
        self._shapes.count((value for _, value in raw), self._reading.columns)
        if self._reading.shape is not None:
            self._append(*_encoded(list(self._examples(raw, self._reading.shape)), self._encoder))
        self._rows += len(raw)

    def chunk(self, broken: BrokenLines) -> ReadChunk:
        """All of it; without the rows where lines cannot be read."""
        if broken.count:
            return ReadChunk(self._rows, self._shapes, broken, np.empty(0, ROW), *_no_tokens(self._encoder))
        return ReadChunk(
            self._rows,
            self._shapes,
            broken,
            np.concatenate(self._tables),
            np.concatenate(self._ids),
            np.concatenate(self._masks),
            self._problems,
            self._unknown_labels,
            self._refused,
        )

    def _examples(self, raw: Sequence[tuple[int, Any]], shape: str) -> Iterator[tuple[int, Example]]:
        """The rows that can be used, with their numbers."""
        file = self._reading.path.name
        for number, (line, value) in enumerate(raw, start=self._rows):
            try:
                yield number, to_example(RawRow(Origin(file, line), value), shape, self._reading.columns)
            except LabelError as error:
                self._unknown_labels.append(RowFault(line, str(error)))
            except RowError as error:
                self._problems.append(RowFault(line, str(error)))

    def _append(self, table: Table, ids: TokenArray, mask: BoolArray, refused: Sequence[RowFault]) -> None:
        table["start"] += self._tokens
        self._refused += [RowFault(self._places + fault.at, fault.reason) for fault in refused]
        self._tables.append(table)
        self._ids.append(ids)
        self._masks.append(mask)
        self._tokens += len(ids)
        self._places += len(table)


def _no_tokens(encoder: Encoder | None) -> tuple[TokenArray, BoolArray]:
    return np.empty(0, ids_type(encoder)), np.empty(0, np.bool_)


def ids_type(encoder: Encoder | None) -> type[np.uint16] | type[np.int32]:
    """The type of the ids, as they are stored."""
    return token_type(encoder.tokenizer.largest_id if encoder else 0)


def _encoded(
    examples: Sequence[tuple[int, Example]], encoder: Encoder | None
) -> tuple[Table, TokenArray, BoolArray, list[RowFault]]:
    """Records, tokens and masks of some rows, and those that the template refuses, by their place among them."""
    table = np.zeros(len(examples), ROW)
    for record, (number, example) in zip(table, examples, strict=True):
        _describe(record, number, example)
    if encoder is None:
        return table, *_no_tokens(None), []
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
    return table, *_placed(table, wanted, rows, encoder)


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
    table: Table, places: Sequence[int], rows: Sequence[EncodedExample], encoder: Encoder
) -> tuple[TokenArray, BoolArray, list[RowFault]]:
    """Tokens end to end; the records say where each row's are. Rows that the template refuses have none."""
    count, start, refused = sum(len(row.ids) for row in rows), 0, list[RowFault]()
    all_ids, all_masks = empty(count, ids_type(encoder)), empty(count, np.bool_)
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
    return all_ids, all_masks, refused

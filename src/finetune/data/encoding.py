"""A chunk of a file to arrays: parsed, checked, rendered, tokenised, masked. The work that other processes share.

What comes out depends on the chunk, the shape and the encoder alone, so any number of processes gives the same bits.
"""

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
from finetune.data.spans import RenderedRow
from finetune.data.templates import Template
from finetune.data.token_store import IS_DIALOGUE, IS_REFUSED, IS_TEXT, ROLES, ROW, Table, TokenArray, token_type
from finetune.data.token_store import checksum as checksum_of
from finetune.data.tokenize import encode_rendered, render_each
from finetune.data.tokenizer import TextTokenizer


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
    problems: list[RowFault]  # by line
    unknown_labels: list[RowFault]  # by line
    refused: list[RowFault]  # by place in the table


def read_chunk(chunk: Chunk, reading: Reading, encoder: Encoder | None) -> ReadChunk:
    """Read a chunk, and encode its rows where there is an encoder. Raises DataError for text that is no text."""
    found, rendered = _rendered_chunk(chunk, reading, encoder)
    if encoder is None:
        return found
    ids, mask = _placed(found.table, rendered, encoder, found.refused)
    return found._replace(ids=ids, mask=mask)


def _rendered_chunk(
    chunk: Chunk, reading: Reading, encoder: Encoder | None
) -> tuple[ReadChunk, dict[int, RenderedRow | str]]:
    """A chunk without its tokens, and the rows to encode by their places in the table; of parsed rows nothing stays."""
    shapes, broken = ShapeCounts(), BrokenLines()
    raw = list(rows_of(chunk, reading.path, broken))
    shapes.count((value for _, value in raw), reading.columns)
    found = ReadChunk(len(raw), shapes, broken, np.empty(0, ROW), *_no_tokens(encoder), [], [], [])
    if reading.shape is None or broken.count:
        return found, {}
    examples = list(_examples(raw, reading, reading.shape, found))
    table = np.zeros(len(examples), ROW)
    for record, (number, example) in zip(table, examples, strict=True):
        _describe(record, number, example)
    return found._replace(table=table), {} if encoder is None else _rendered(examples, encoder)


def _no_tokens(encoder: Encoder | None) -> tuple[TokenArray, BoolArray]:
    return np.empty(0, ids_type(encoder)), np.empty(0, np.bool_)


def ids_type(encoder: Encoder | None) -> type[np.uint16] | type[np.int32]:
    """The type of the ids, as they are stored."""
    return token_type(encoder.tokenizer.largest_id if encoder else 0)


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


def _rendered(examples: Sequence[tuple[int, Example]], encoder: Encoder) -> dict[int, RenderedRow | str]:
    wanted = {
        place: example
        for place, (_, example) in enumerate(examples)
        if encoder.include_undesirable or example.desirable is not False
    }
    return dict(zip(wanted, render_each(wanted.values(), encoder.template), strict=True))


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
    table: Table, rendered: Mapping[int, RenderedRow | str], encoder: Encoder, refused: list[RowFault]
) -> tuple[TokenArray, BoolArray]:
    """Tokens end to end; the records say where each row's are."""
    start, stored_as = 0, ids_type(encoder)
    all_ids, all_masks = bytearray(), bytearray()
    rows = encode_rendered(rendered.values(), tokenizer=encoder.tokenizer, train_on_prompt=encoder.train_on_prompt)
    for place, row in zip(rendered, rows, strict=True):
        record = table[place]
        if row.refusal is not None:
            record["flags"] |= IS_REFUSED
            refused.append(RowFault(place, row.refusal))
            continue
        ids = empty(len(row.ids), stored_as)
        ids[:] = row.ids
        record["start"], record["length"] = start, len(ids)
        record["trained"] = np.count_nonzero(row.mask)
        record["trained_from"] = int(row.mask.argmax()) if row.mask.any() else -1
        record["checksum"] = checksum_of(ids, row.mask)
        record["unseen"] = sum(1 << ROLES.index(role) for role in row.unseen_roles)
        start += len(ids)
        all_ids += ids.data
        all_masks += row.mask.data
    return np.frombuffer(all_ids, stored_as), np.frombuffer(all_masks, np.bool_)

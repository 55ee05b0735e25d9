"""Prompts to answer beside the answers that the data gives: for samples during training and for exact match."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from finetune.core.errors import DataError
from finetune.data.checks import row_key
from finetune.data.conversations import RowError
from finetune.data.formats import to_example
from finetune.data.groups import Positions
from finetune.data.loaded import LoadedData, LoadedFile
from finetune.data.rows import EncodedRow, Example
from finetune.data.spans import render_example
from finetune.data.stored_rows import StoredRows
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, as text and as ids (BOS included), and the expected answer without its end token."""

    prompt_ids: tuple[int, ...]
    prompt: str
    expected: str
    is_answer: bool = True  # False: plain text, which continues in more than one right way


def make_samples(
    loaded: LoadedData,
    rows: StoredRows,
    *,
    columns: Mapping[str, str],
    template: Template,
    tokenizer: TextTokenizer,
    limit: int | None,
) -> tuple[Sample, ...]:
    """The first `limit` rows (None: all) as samples; rows that were cut have no full answer and are passed over.

    The texts are read from the files again: only tokens are kept of a row.
    """
    numbers = np.flatnonzero(rows.whole)[:limit]
    examples = examples_at(loaded, rows.positions[numbers], columns)
    return tuple(
        _continuation(rows[number], tokenizer) if example.text is not None else _answer(example, template, tokenizer)
        for number, example in zip(numbers.tolist(), examples, strict=True)
    )


@dataclass(frozen=True, slots=True)
class LoadedExamples:
    """All usable rows as examples, read from the files again each time they are gone through."""

    loaded: LoadedData
    columns: Mapping[str, str]

    def __iter__(self) -> Iterator[Example]:
        return examples_at(self.loaded, np.arange(len(self.loaded)), self.columns)


def examples_at(loaded: LoadedData, positions: Positions, columns: Mapping[str, str]) -> Iterator[Example]:
    """The rows at these ascending positions, read again. Raises DataError where a file is not the same any more."""
    for file, start in zip(loaded.files, loaded.starts.tolist(), strict=False):
        places = positions[(positions >= start) & (positions < start + len(file.store))] - start
        yield from _examples_of(file, places, columns)


def _examples_of(file: LoadedFile, places: Positions, columns: Mapping[str, str]) -> Iterator[Example]:
    numbers = file.store.column("number")[places].tolist()
    keys = file.store.column("row")[places]
    rows = enumerate(file.source.rows())
    for number, key in zip(numbers, keys, strict=True):
        row = next((row for at, row in rows if at == number), None)
        try:
            example = None if row is None else to_example(row, file.shape.name, columns)
        except RowError:
            example = None
        if example is None or (np.frombuffer(row_key(example), "<u8")[:2] != key).any():
            raise DataError(f"{file.source.path}: the file changed while it was read. Start again when it is complete.")
        yield example


def _answer(example: Example, template: Template, tokenizer: TextTokenizer) -> Sample:
    """The last answer of a conversation, and everything in front of it."""
    last = max(
        index
        for index, message in enumerate(example.messages)
        if message.role == "assistant" and (message.content.strip() or message.tool_calls)
    )
    prompt = template.render_prompt(example.messages[:last], example.tools, example.fields)
    rendered = render_example(template, replace(example, messages=example.messages[: last + 1]))
    start, end = rendered.spans[-1]
    expected = rendered.text[start:end].strip()
    for closer in (*template.shape.closers, template.turn_end):
        expected = expected.removesuffix(closer).strip() if closer else expected
    return Sample(tokenizer.prompt_ids(prompt), prompt, expected)


def _continuation(row: EncodedRow, tokenizer: TextTokenizer) -> Sample:
    """Plain text: the first third is the prompt."""
    ids = tuple(int(token) for token in row.input_ids)
    cut = max(1, len(ids) // 3)
    return Sample(ids[:cut], tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:]).strip(), is_answer=False)

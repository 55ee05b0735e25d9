"""Prompts to answer beside the answers that the data gives: for samples during training and for exact match."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from finetune.core.errors import DataError
from finetune.data.checks import row_key
from finetune.data.columns import Positions, at, windows
from finetune.data.conversations import RowError
from finetune.data.formats import to_example
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
    numbers = rows.first_whole(limit)
    examples = examples_at(loaded, at(rows.positions, np.array(numbers, np.int64)), columns)
    return tuple(
        _continuation(rows[number], tokenizer) if example.text is not None else _answer(example, template, tokenizer)
        for number, example in zip(numbers, examples, strict=True)
    )


@dataclass(frozen=True, slots=True)
class LoadedExamples:
    """All usable rows as examples, read from the files again each time they are gone through."""

    loaded: LoadedData
    columns: Mapping[str, str]

    def __iter__(self) -> Iterator[Example]:
        return examples_at(self.loaded, None, self.columns)


def examples_at(loaded: LoadedData, positions: Positions | None, columns: Mapping[str, str]) -> Iterator[Example]:
    """The rows at these ascending positions (None: all), read again.

    Raises DataError where a file is not the same any more.
    """
    for file, start in zip(loaded.files, loaded.starts.tolist(), strict=False):
        yield from _examples_of(file, _records(file, start, positions), columns)


def _records(file: LoadedFile, start: int, positions: Positions | None) -> Iterator[np.void]:
    """The records of a file's rows among these."""
    if positions is None:
        first, end = 0, len(file.store)
    else:
        first, end = np.searchsorted(positions, [start, start + len(file.store)]).tolist()
    for window in windows(end - first):
        numbers = np.arange(first + window.start, first + window.stop)
        yield from file.store.records(numbers if positions is None else positions[numbers] - start)


def _examples_of(file: LoadedFile, records: Iterable[np.void], columns: Mapping[str, str]) -> Iterator[Example]:
    rows = enumerate(file.source.rows())
    for record in records:
        number = int(record["number"])
        row = next((row for place, row in rows if place == number), None)
        try:
            example = None if row is None else to_example(row, file.shape.name, columns)
        except RowError:
            example = None
        if example is None or (np.frombuffer(row_key(example), "<u8")[:2] != record["row"]).any():
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

"""Look at data before training: what a file holds, what the model will see, and a clean copy of it."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config.schema import DataFile
from finetune.core.errors import DataError, UsageError
from finetune.data.checks import LengthCounts
from finetune.data.columns import at, where
from finetune.data.encoding import Encoder
from finetune.data.fates import Survey, WantedRows
from finetune.data.listing import RowListing
from finetune.data.load import Means, load, means_for, open_files
from finetune.data.loaded import LoadedData, LoadedFile
from finetune.data.rendering import load_in_template, template_for
from finetune.data.report import lengths_as_dict
from finetune.data.rows import Example, Message, Problem
from finetune.data.samples import examples_at
from finetune.data.selection import conflicts
from finetune.data.split import split_rows
from finetune.data.stored_rows import StoredRows
from finetune.data.templates import Template, as_turn
from finetune.data.token_store import IS_REFUSED
from finetune.data.tokenize import EncodedExample, encode_each
from finetune.data.tokenizer import TextTokenizer
from finetune.models.source import ModelSource, resolve_model

Columns = Mapping[str, str]
_UNLIMITED = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What there is to say about a data set, as one JSON object, and the rows that training would leave out or cut."""

    record: dict[str, Any]
    left_out: RowListing


def dataset_info(path: str, *, columns: Columns, model: str | None = None, template: str | None = None) -> DatasetInfo:
    """Everything there is to say about a data set.

    Bad rows are listed and not refused; what cannot be read at all raises DataError. With a model, the lengths
    in tokens are there too.
    """
    source = None if model is None else resolve_model(model, weights=False)
    means = means_for([path])
    if source is None:
        loaded = load(
            open_files([DataFile(path=path)]), columns=columns, encoder=None, means=means, max_error_rate=None
        )
        tokens, context = None, None
    else:
        loaded, chosen = _in_tokens(path, source, template, columns, means)
        context = source.context_length
        tokens = _token_lengths(loaded, chosen, context)
    wanted = WantedRows.of(loaded, include_undesirable=False, keep_duplicates=False)
    fates = wanted.fates(context or _UNLIMITED, drop_long=False, tokens=source is not None)
    return DatasetInfo(_info(path, loaded, Survey.of(wanted), tokens), RowListing([fates]))


def _info(path: str, loaded: LoadedData, survey: Survey, tokens: dict[str, Any] | None) -> dict[str, Any]:
    files, problems = loaded.files, loaded.problems
    conflicting = _conflicts(loaded, survey)
    return {
        "path": path,
        "format": _common(file.source.format for file in files),
        "encoding": _common(file.source.encoding for file in files),
        "shape": _common(file.shape.name for file in files),
        "description": _common(file.shape.description for file in files),
        "rows": loaded.rows,
        "usable_rows": len(loaded),
        "duplicates": survey.copies,
        "labels": survey.labels,
        "conflicts": len(conflicting),
        "conflicting_rows": conflicting,
        "errors": _errors(problems),
        "error_rate": len(problems) / loaded.rows,
        "unused_columns": _unused(files),
        "characters": lengths_as_dict(_characters(loaded).summary()),
        "tokens": tokens,
        "files": [asdict(file.report()) for file in files],
    }


def _common(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _errors(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    return [{"file": p.origin.file, "line": p.origin.line, "reason": p.reason} for p in problems]


def _unused(files: Sequence[LoadedFile]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file.shape.unused_columns)
    return dict(counts)


def _conflicts(loaded: LoadedData, survey: Survey) -> list[list[str]]:
    """Places of rows with the same request and both labels, in the order of the first of each."""
    found = sorted(conflicts(loaded, survey), key=lambda rows: int(rows[0]))
    return [[str(loaded.origin(row)) for row in rows.tolist()] for rows in found]


def _characters(loaded: LoadedData) -> LengthCounts:
    counts = LengthCounts()
    for _, records in loaded.windows():
        counts.add(records["characters"])
    return counts


def _in_tokens(
    path: str, source: ModelSource, template: str | None, columns: Columns, means: Means
) -> tuple[LoadedData, Template]:
    tokenizer = TextTokenizer.open(source.path)
    return load_in_template(
        open_files([DataFile(path=path)]),
        template,
        lambda chosen: Encoder(chosen, tokenizer),
        tokenizer=tokenizer,
        columns=columns,
        means=means,
        max_error_rate=None,
    )


def _token_lengths(loaded: LoadedData, template: Template, context: int | None) -> dict[str, Any]:
    counts, trained, longer = LengthCounts(), 0, 0
    for _, records in loaded.windows():
        lengths = records["length"][records["flags"] & IS_REFUSED == 0]
        counts.add(lengths)
        trained += int(records["trained"].sum(dtype=np.int64))
        longer += int((lengths > context).sum()) if context else 0
    return {
        **(lengths_as_dict(counts.summary()) or {}),
        "template": template.name,
        "trained": trained,
        "context_length": context,
        "longer_than_context": longer,
        "errors": _errors(problem for _, problem in loaded.refusals()),
    }


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens that are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """A row as the model will see it. `tokens`, `token_texts` and `mask` have one entry a token."""

    origin: str
    label: bool | None
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    mask: tuple[bool, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Rows with the template that rendered them; `special_tokens` are the texts to make visible."""

    template: str
    rows: tuple[InspectedRow, ...]
    special_tokens: frozenset[str]
    errors: tuple[str, ...]


def inspect_dataset(
    path: str, *, model: str, template: str | None, columns: Columns, rows: int, train_on_prompt: bool = False
) -> Inspection:
    """The first `rows` usable rows, rendered and tokenised for `model` (weights are not needed)."""
    means = means_for([path])
    loaded = load(open_files([DataFile(path=path)]), columns=columns, encoder=None, means=means, max_error_rate=None)
    if not len(loaded):
        raise DataError(f"{path}: there is no row to show: {loaded.problems[0]}")
    source = resolve_model(model, weights=False)
    tokenizer = TextTokenizer.open(source.path)
    chosen = template_for(template, tokenizer, loaded.kinds())
    examples = list(examples_at(loaded, np.arange(min(rows, len(loaded))), columns))
    encoded = encode_each(examples, template=chosen, tokenizer=tokenizer, train_on_prompt=train_on_prompt)
    shown = list(zip(encoded, examples, strict=True))
    return Inspection(
        template=chosen.name,
        rows=tuple(_inspected(row, example, tokenizer) for row, example in shown if row.refusal is None),
        special_tokens=tokenizer.special_tokens,
        errors=tuple(f"{example.origin}: {row.refusal}" for row, example in shown if row.refusal is not None),
    )


def _inspected(row: EncodedExample, example: Example, tokenizer: TextTokenizer) -> InspectedRow:
    tokens, mask = tuple(row.ids.tolist()), tuple(row.mask.tolist())
    return InspectedRow(
        origin=str(example.origin),
        label=example.desirable,
        tokens=tokens,
        token_texts=tuple(tokenizer.token_text(token) for token in tokens),
        mask=mask,
        segments=tuple(_segments(tokens, mask, tokenizer)),
    )


def _segments(tokens: Sequence[int], mask: Sequence[bool], tokenizer: TextTokenizer) -> list[Segment]:
    """Texts between changes of the mask. Decoding from the start keeps the spaces that a part would lose."""
    borders = [position for position in range(1, len(mask)) if mask[position] != mask[position - 1]]
    segments, done = [], ""
    for start, end in zip([0, *borders], [*borders, len(tokens)], strict=True):
        text = tokenizer.decode(tokens[:end], skip_special=False)
        segments.append(Segment(text[len(done) :], mask[start]))
        done = text
    return segments


@dataclass(frozen=True, slots=True)
class WrittenDataset:
    """What `prepare_dataset` wrote: files with their numbers of rows, and what it left out."""

    files: dict[str, int]
    read: int
    duplicates: int
    dropped: tuple[str, ...]


def prepare_dataset(
    path: str, output: Path, *, columns: Columns, split: float, seed: int, max_error_rate: float
) -> WrittenDataset:
    """Write the rows as OpenAI messages (or text), one JSON object a line, one copy of each.

    With `split`, that share goes to `<output>-validation.jsonl`. Raises UsageError where a file exists already.
    """
    held_out_path = output.with_name(f"{output.stem}-validation{output.suffix or '.jsonl'}")
    for target in [output, held_out_path] if split else [output]:
        if target.exists():
            raise UsageError(f"--output: {target} exists already. Choose another name, or delete it first.")
    means = means_for([path])
    sources = open_files([DataFile(path=path)])
    loaded = load(sources, columns=columns, encoder=None, means=means, max_error_rate=max_error_rate)
    back = loaded.by_digest("row").steps_back()
    first = StoredRows(loaded, where(back, lambda steps: steps == 0), _UNLIMITED)
    train, held_out = (at(first.positions, rows) for rows in split_rows(first.by_request(), share=split, seed=seed))
    written = {output: train, **({held_out_path: held_out} if split else {})}
    for target, positions in written.items():
        _write_rows(target, examples_at(loaded, positions, columns))
    counts = {str(target): len(positions) for target, positions in written.items()}
    problems = tuple(str(problem) for problem in loaded.problems)
    return WrittenDataset(counts, loaded.rows, len(loaded) - len(first), problems)


def _write_rows(target: Path, examples: Iterable[Example]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_as_openai(example), ensure_ascii=False) + "\n" for example in examples)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(f"{target} cannot be written ({error.strerror}).") from error


def _as_openai(example: Example) -> dict[str, Any]:
    """The row in OpenAI's form: arguments as a JSON string, null beside tool calls."""
    row: dict[str, Any] = (
        {"text": example.text}
        if example.text is not None
        else {"messages": [_openai_message(message) for message in example.messages]}
    )
    if example.tools:
        row["tools"] = list(example.tools)
    if example.desirable is not None:
        row["label"] = example.desirable
    return row


def _openai_message(message: Message) -> dict[str, Any]:
    turn = as_turn(message)
    if message.tool_calls:
        turn["content"] = message.content or None
        turn["tool_calls"] = [_openai_call(call) for call in message.tool_calls]
    return turn


def _openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {"name": function["name"], "arguments": text}}

"""Look at data before training: what a file holds, what the model will see, and a clean copy of it."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import DataFile
from finetune.core.errors import DataError, UsageError
from finetune.data.checks import conflicting_prompts, label_counts, repeated, summarise_lengths
from finetune.data.load import ParsedFile, file_report, load_examples, parse_file
from finetune.data.prepare import template_for
from finetune.data.readers import read_path
from finetune.data.report import lengths_as_dict
from finetune.data.rows import EncodedRow, Example, Message
from finetune.data.split import split_examples
from finetune.data.templates import Template, as_turn
from finetune.data.tokenize import EncodedExamples, encode_examples
from finetune.data.tokenizer import TextTokenizer
from finetune.models.source import resolve_model

Columns = Mapping[str, str]


def dataset_info(
    path: str, *, columns: Columns, model: str | None = None, template: str | None = None
) -> dict[str, Any]:
    """Everything there is to say about a data set, as one JSON object.

    Bad rows are listed and not refused; what cannot be read at all raises DataError. With a model, the lengths
    in tokens are there too.
    """
    parsed = [parse_file(source, columns) for source in read_path(Path(path).expanduser())]
    examples = [example for file in parsed for example in file.examples]
    problems = [problem for file in parsed for problem in file.problems]
    rows = sum(len(file.source.rows) for file in parsed)
    lengths = summarise_lengths([_characters(example) for example in examples])
    conflicts = conflicting_prompts(examples)
    return {
        "path": path,
        "format": _common(file.source.format for file in parsed),
        "encoding": _common(file.source.encoding for file in parsed),
        "shape": _common(file.shape.name for file in parsed),
        "description": _common(file.shape.description for file in parsed),
        "rows": rows,
        "usable_rows": len(examples),
        "duplicates": len(repeated(examples)),
        "labels": label_counts(examples),
        "conflicts": len(conflicts),
        "conflicting_rows": [[str(example.origin) for example in group] for group in conflicts],
        "errors": [{"file": p.origin.file, "line": p.origin.line, "reason": p.reason} for p in problems],
        "error_rate": len(problems) / rows,
        "unused_columns": _unused(parsed),
        "characters": lengths_as_dict(lengths),
        "tokens": None if model is None else _token_lengths(examples, model, template),
        "files": [asdict(file_report(file)) for file in parsed],
    }


def _common(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))


def _unused(parsed: Sequence[ParsedFile]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for file in parsed:
        counts.update(file.shape.unused_columns)
    return dict(counts)


def _characters(example: Example) -> int:
    return len(example.text) if example.text is not None else sum(len(m.content) for m in example.messages)


def _token_lengths(examples: Sequence[Example], model: str, template: str | None) -> dict[str, Any]:
    source = resolve_model(model, weights=False)
    encoded, chosen, _ = _encoded(examples, source.path, template)
    lengths = summarise_lengths([len(row) for row in encoded.rows])
    context = source.context_length
    return {
        **(lengths_as_dict(lengths) or {}),
        "template": chosen.name,
        "trained": sum(int(row.loss_mask.sum()) for row in encoded.rows),
        "context_length": context,
        "longer_than_context": sum(len(row) > context for row in encoded.rows) if context else 0,
        "errors": [{"file": p.origin.file, "line": p.origin.line, "reason": p.reason} for p in encoded.problems],
    }


def _encoded(
    examples: Sequence[Example], model: Path, template: str | None, *, train_on_prompt: bool = False
) -> tuple[EncodedExamples, Template, TextTokenizer]:
    tokenizer = TextTokenizer.open(model)
    chosen = template_for(template, tokenizer, examples)
    encoded = encode_examples(examples, template=chosen, tokenizer=tokenizer, train_on_prompt=train_on_prompt)
    return encoded, chosen, tokenizer


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
    parsed = [parse_file(source, columns) for source in read_path(Path(path).expanduser())]
    examples = [example for file in parsed for example in file.examples]
    if not examples:
        raise DataError(f"{path}: there is no row to show: {parsed[0].problems[0]}")
    source = resolve_model(model, weights=False)
    tokenizer = TextTokenizer.open(source.path)
    chosen = template_for(template, tokenizer, examples)
    encoded = encode_examples(examples[:rows], template=chosen, tokenizer=tokenizer, train_on_prompt=train_on_prompt)
    shown = zip(encoded.rows, encoded.examples, strict=True)
    return Inspection(
        template=chosen.name,
        rows=tuple(_inspected(row, example, tokenizer) for row, example in shown),
        special_tokens=tokenizer.special_tokens,
        errors=tuple(str(problem) for problem in encoded.problems),
    )


def _inspected(row: EncodedRow, example: Example, tokenizer: TextTokenizer) -> InspectedRow:
    tokens, mask = tuple(row.input_ids.tolist()), tuple(row.loss_mask.tolist())
    return InspectedRow(
        origin=str(row.origin),
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
    loaded = load_examples([DataFile(path=path)], columns=columns, max_error_rate=max_error_rate)
    copies = set(repeated(loaded.examples))
    examples = [example for position, example in enumerate(loaded.examples) if position not in copies]
    train, held_out = split_examples(examples, share=split, seed=seed)
    written = {output: [examples[position] for position in train]}
    if split:
        written[held_out_path] = [examples[position] for position in held_out]
    for target, rows in written.items():
        _write_rows(target, rows)
    counts = {str(target): len(rows) for target, rows in written.items()}
    return WrittenDataset(counts, loaded.rows, len(copies), tuple(str(problem) for problem in loaded.problems))


def _write_rows(target: Path, examples: Sequence[Example]) -> None:
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

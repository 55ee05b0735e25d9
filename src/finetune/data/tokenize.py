"""From examples to token ids with their loss mask.

The whole text of a row is tokenised once, and a token is trained on when it covers a character of an answer:
the prompt need not be a prefix of the row once tokenised, and no marker is searched for among the ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from finetune.core.errors import DataError
from finetune.core.types import BoolArray, IntArray
from finetune.data.rows import EncodedRow, Example, Origin, Problem
from finetune.data.spans import RenderedRow, render_example
from finetune.data.templates import Template, TemplateError
from finetune.data.tokenizer import TextTokenizer

_CHUNK = 1_000  # rows tokenised in one call: enough to keep all cores busy, few enough to stay small


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """Rows in the order of the examples; an example without a row has a problem instead."""

    rows: list[EncodedRow]
    examples: list[Example]  # those that have a row, in step with `rows`
    problems: list[Problem]
    unseen_roles: dict[str, int]  # role to number of rows in which the template leaves it out


def encode_examples(
    examples: Sequence[Example], *, template: Template, tokenizer: TextTokenizer, train_on_prompt: bool = False
) -> EncodedExamples:
    """Render, tokenise and mask. Rows keep their full length."""
    encoded = EncodedExamples([], [], [], {})
    for start in range(0, len(examples), _CHUNK):
        _encode_chunk(examples[start : start + _CHUNK], template, tokenizer, train_on_prompt, encoded)
    return encoded


def _encode_chunk(
    examples: Sequence[Example],
    template: Template,
    tokenizer: TextTokenizer,
    train_on_prompt: bool,
    encoded: EncodedExamples,
) -> None:
    rendered: list[tuple[Example, RenderedRow]] = []
    for example in examples:
        try:
            row = _rendered(example, template)
        except TemplateError as error:
            encoded.problems.append(Problem(example.origin, str(error)))
            continue
        for role in row.unseen_roles:
            encoded.unseen_roles[role] = encoded.unseen_roles.get(role, 0) + 1
        rendered.append((example, row))
    for (example, row), (ids, offsets) in zip(
        rendered, tokenizer.encode_batch([row.text for _, row in rendered]), strict=True
    ):
        mask = np.ones(len(ids), np.bool_) if train_on_prompt else covered(offsets, row.spans)
        encoded.rows.append(_finished_row(ids, mask, row.needs_eos, example.origin, tokenizer))
        encoded.examples.append(example)


def _rendered(example: Example, template: Template) -> RenderedRow:
    if example.text is not None:
        return RenderedRow(example.text, ((0, len(example.text)),), needs_eos=True)
    return render_example(template, example)


def _finished_row(
    ids: IntArray, mask: BoolArray, needs_eos: bool, origin: Origin, tokenizer: TextTokenizer
) -> EncodedRow:
    """Add EOS (trained, whether or not it doubles as padding) where the text lacks one, and see to one BOS."""
    if needs_eos and tokenizer.eos_id is not None and (len(ids) == 0 or ids[-1] != tokenizer.eos_id):
        ids = np.append(ids, np.int32(tokenizer.eos_id))
        mask = np.append(mask, True)
    with_bos = tokenizer.with_one_bos(ids)
    added = len(with_bos) - len(ids)
    mask = np.concatenate([np.zeros(added, np.bool_), mask]) if added > 0 else mask[-added:].copy()
    mask[:1] = False  # nothing stands in front of the first token to predict it from
    return EncodedRow(with_bos.astype(np.int32), mask, origin)


def covered(offsets: IntArray, spans: Sequence[tuple[int, int]]) -> BoolArray:
    """For each token [n], whether its character range shares at least one character with a span."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), np.bool_)
    for start, end in spans:
        mask |= (starts < end) & (ends > start) & (ends > starts)
    return mask


@dataclass(frozen=True, slots=True)
class LimitedRows:
    """Rows that fit. `kept` are the positions of the input rows they come from."""

    rows: list[EncodedRow]
    kept: list[int]
    too_long: int  # dropped for their length
    untrained: int  # dropped because no trained token is left
    truncated: int  # cut, and still in `rows`


def limit_rows(
    rows: Sequence[EncodedRow], *, max_length: int, on_long: Literal["truncate", "drop", "error"]
) -> LimitedRows:
    """Cut, drop or refuse rows of more than `max_length` tokens; drop rows without a trained token."""
    long = [row for row in rows if len(row) > max_length]
    if long and on_long == "error":
        first = "; ".join(f"{row.origin} has {len(row):,}" for row in long[:5])
        raise DataError(
            f"{len(long):,} rows are longer than data.max_length={max_length:,} tokens, and data.on_long is error: "
            f"{first}. Raise data.max_length to {max(map(len, long)):,}, or set data.on_long to truncate or drop."
        )
    result, kept, too_long, untrained = list[EncodedRow](), list[int](), 0, 0
    for position, row in enumerate(rows):
        if len(row) > max_length and on_long == "drop":
            too_long += 1
            continue
        fitting = _cut(row, max_length)
        if not fitting.loss_mask.any():
            untrained += 1
            continue
        result.append(fitting)
        kept.append(position)
    return LimitedRows(result, kept, too_long, untrained, sum(row.truncated for row in result))


def _cut(row: EncodedRow, max_length: int) -> EncodedRow:
    if len(row) <= max_length:
        return row
    ids, mask = row.input_ids[:max_length].copy(), row.loss_mask[:max_length].copy()
    return replace(row, input_ids=ids, loss_mask=mask, truncated=True)

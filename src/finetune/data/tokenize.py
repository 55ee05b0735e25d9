"""From examples to token ids with their loss mask.

The whole text of a row is tokenised once, and a token is trained on when it covers a character of an answer:
the prompt need not be a prefix of the row once tokenised, and no marker is searched for among the ids.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.core.types import BoolArray, IntArray
from finetune.data.buffers import empty, joined
from finetune.data.rows import Example
from finetune.data.spans import RenderedRow, render_example
from finetune.data.templates import Template, TemplateError
from finetune.data.tokenizer import TextTokenizer

_NOTHING: IntArray = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids and mask of an example at full length, or why the template refuses it."""

    ids: IntArray
    mask: BoolArray
    unseen_roles: tuple[str, ...] = ()  # whose messages the template leaves out
    refusal: str | None = None


def encode_each(
    examples: Sequence[Example], *, template: Template, tokenizer: TextTokenizer, train_on_prompt: bool = False
) -> list[EncodedExample]:
    """Render, tokenise and mask each example."""
    rendered = render_each(examples, template)
    return list(encode_rendered(rendered, tokenizer=tokenizer, train_on_prompt=train_on_prompt))


def render_each(examples: Iterable[Example], template: Template) -> list[RenderedRow | str]:
    """Each as text with its answers, or why the template refuses it."""
    return [_rendered_or_reason(example, template) for example in examples]


def encode_rendered(
    rendered: Collection[RenderedRow | str], *, tokenizer: TextTokenizer, train_on_prompt: bool = False
) -> Iterator[EncodedExample]:
    """Tokenise and mask what `render_each` gives, in turn."""
    tokens = tokenizer.encode_batch([row.text for row in rendered if isinstance(row, RenderedRow)])
    for row in rendered:
        if isinstance(row, str):
            yield EncodedExample(_NOTHING, _NOTHING.astype(np.bool_), refusal=row)
        else:
            yield _masked(row, *next(tokens), tokenizer, train_on_prompt)


def _masked(
    row: RenderedRow, ids: IntArray, offsets: IntArray, tokenizer: TextTokenizer, train_on_prompt: bool
) -> EncodedExample:
    mask = np.ones(len(ids), np.bool_) if train_on_prompt else covered(offsets, row.spans)
    return EncodedExample(*_finished(ids, mask, row.needs_eos, tokenizer), row.unseen_roles)


def _rendered_or_reason(example: Example, template: Template) -> RenderedRow | str:
    try:
        return _rendered(example, template)
    except TemplateError as error:
        return str(error)


def _rendered(example: Example, template: Template) -> RenderedRow:
    if example.text is not None:
        return RenderedRow(example.text, ((0, len(example.text)),), needs_eos=True)
    return render_example(template, example)


def _finished(ids: IntArray, mask: BoolArray, needs_eos: bool, tokenizer: TextTokenizer) -> tuple[IntArray, BoolArray]:
    """Add EOS (trained, whether or not it doubles as padding) where the text lacks one, and see to one BOS."""
    if needs_eos and tokenizer.eos_id is not None and (len(ids) == 0 or ids[-1] != tokenizer.eos_id):
        ids = joined(ids, np.array([tokenizer.eos_id], np.int32))
        mask = joined(mask, np.ones(1, np.bool_))
    with_bos = tokenizer.with_one_bos(ids)
    added = len(with_bos) - len(ids)
    mask = joined(np.zeros(added, np.bool_), mask) if added > 0 else mask[-added:]
    mask[:1] = False  # nothing stands in front of the first token to predict it from
    return with_bos.astype(np.int32, copy=False), mask


def covered(offsets: IntArray, spans: Sequence[tuple[int, int]]) -> BoolArray:
    """For each token [n], whether its character range shares at least one character with a span."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask, inside, other = (empty(len(offsets), np.bool_) for _ in range(3))
    mask[:] = False
    for start, end in spans:
        np.less(starts, end, out=inside)
        inside &= np.greater(ends, start, out=other)
        inside &= np.greater(ends, starts, out=other)
        mask |= inside
    return mask

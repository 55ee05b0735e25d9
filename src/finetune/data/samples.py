"""Prompts to answer beside the answers that the data gives: for samples during training and for exact match."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.data.rows import EncodedRow, Example
from finetune.data.spans import render_example
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
    examples: Sequence[Example],
    rows: Sequence[EncodedRow],
    *,
    template: Template,
    tokenizer: TextTokenizer,
    limit: int | None,
) -> tuple[Sample, ...]:
    """The first `limit` rows (None: all) as samples; rows that were cut have no full answer and are passed over."""
    whole = [(example, row) for example, row in zip(examples, rows, strict=True) if not row.truncated]
    chosen = whole if limit is None else whole[:limit]
    return tuple(
        _continuation(row, tokenizer) if example.text is not None else _answer(example, template, tokenizer)
        for example, row in chosen
    )


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

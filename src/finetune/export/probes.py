"""Rows on which an export is compared with its original, where the run's own validation rows cannot be had."""

import itertools
from collections.abc import Sequence

import numpy as np

from finetune.core.types import IntArray
from finetune.data.rows import EncodedRow, Origin
from finetune.data.tokenizer import TextTokenizer

PROBE_ROWS = 4
PROBE_TOKENS = 256
TEXTS = (
    "Once upon a time there was a small engine that pulled heavy trains over a mountain.",
    'User: Set a timer for 12 minutes.\nAssistant: {"name": "set_timer", "arguments": {"minutes": 12}}',
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    "Naïve café, 北京, 3.14159 and 2 + 2 = 4.",
)


def builtin_rows(tokenizer: TextTokenizer) -> list[EncodedRow]:
    """Four short texts, scored in full."""
    return [_scored(tokenizer, text, number) for number, text in enumerate(TEXTS, start=1)]


def probe_rows(validation: Sequence[EncodedRow], tokenizer: TextTokenizer) -> list[EncodedRow]:
    """A few validation rows, cut to a length that is quick to score; built-in texts where there are none."""
    rows = (_cut(row) for row in validation)
    scored = (row for row in rows if row.loss_mask[1:].any())
    return list(itertools.islice(scored, PROBE_ROWS)) or builtin_rows(tokenizer)


def _cut(row: EncodedRow) -> EncodedRow:
    return EncodedRow(row.input_ids[:PROBE_TOKENS], row.loss_mask[:PROBE_TOKENS], row.origin, truncated=True)


def _scored(tokenizer: TextTokenizer, text: str, number: int) -> EncodedRow:
    ids: IntArray = tokenizer.encode(text)[0]
    if tokenizer.bos_id is not None and tokenizer.adds_bos:
        ids = np.concatenate([np.array([tokenizer.bos_id], dtype=np.int32), ids])
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[0] = False
    return EncodedRow(ids, mask, Origin("built-in text", number))

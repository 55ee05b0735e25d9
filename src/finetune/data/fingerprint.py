"""What identifies the data of a run: the bytes of its files, and every token and mask that came of them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from finetune.core.types import BoolArray, IntArray
from finetune.data.progress import Progress, tell
from finetune.data.report import DataReport
from finetune.data.stored_rows import StoredRows
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer

_TOLD = 10_000  # rows between two reports


def fingerprints(
    report: DataReport, train: StoredRows | None, validation: StoredRows, template: Template, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """For run.json and for resuming. Reads every row once, and raises DamagedStoreError for one that has changed."""
    files = (*report.files, *(report.validation.files if report.validation else ()))
    digest = hashlib.sha256()
    tokens, trained = _add(digest, train)
    _add(digest, validation)
    return {
        "files": [{"path": file.path, "sha256": file.sha256, "rows": file.rows} for file in files],
        "rows": 0 if train is None else len(train),
        "validation_rows": len(validation),
        "tokens": tokens,
        "trained_tokens": trained,
        "sha256": digest.hexdigest(),
        "template": template.sha256,
        "tokenizer": tokenizer.fingerprint,
    }


def _add(digest: "hashlib._Hash", rows: StoredRows | None) -> tuple[int, int]:
    """Take every token and mask into the digest; the number of tokens, and of trained ones."""
    digest.update(f"{0 if rows is None else len(rows)} rows".encode())
    tokens = trained = 0
    for ids, mask in _all_of(rows) if rows else ():
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.data)
        digest.update(mask.data)
        tokens += len(ids)
        trained += int(np.count_nonzero(mask))
    return tokens, trained


def _all_of(rows: StoredRows) -> Iterator[tuple[IntArray, BoolArray]]:
    """Ids and masks in turn; it is told how far that is."""
    for number, row in enumerate(rows.tokens(), start=1):
        if number % _TOLD == 0:
            tell(Progress("Checking the tokens", number, number / len(rows)))
        yield row
    if len(rows) >= _TOLD:
        tell(Progress("Checking the tokens", len(rows), 1.0, done=True))

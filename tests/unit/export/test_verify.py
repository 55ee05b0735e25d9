"""What counts as "answers like the original"."""

import numpy as np
import pytest
from tests.support.fake_inference import BigramSession, chain, table
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.data.batching import evaluation_batches
from finetune.data.rows import EncodedRow
from finetune.export.probes import PROBE_TOKENS, TEXTS, builtin_rows, probe_rows
from finetune.export.verify import TOLERANCES, compare, logprobs

BASE = np.array([-1.0, -2.0, -3.0], dtype=np.float32)
TUNED = np.array([-0.5, -1.0, -3.0], dtype=np.float32)


def test_the_largest_difference_decides() -> None:
    close = compare(base=BASE, original=TUNED, exported=TUNED + np.float32(5e-5), stored_as="float32")
    far = compare(base=BASE, original=TUNED, exported=TUNED + np.float32([0, 0, 2e-4]), stored_as="float32")
    assert close.holds
    assert not far.holds
    assert far.largest_difference == pytest.approx(2e-4, rel=1e-2)


def test_an_export_that_lost_the_tuning_is_found() -> None:
    comparison = compare(base=BASE, original=TUNED, exported=BASE, stored_as="float32")
    assert not comparison.holds
    assert comparison.largest_difference == comparison.adapter_effect == 1.0


@pytest.mark.parametrize("stored_as", TOLERANCES)
def test_a_number_that_is_none_never_passes(stored_as: str) -> None:
    assert not compare(base=BASE, original=TUNED, exported=TUNED * np.float32("nan"), stored_as=stored_as).holds


def test_rounded_weights_are_allowed_more_and_the_reason_is_given() -> None:
    comparison = compare(base=BASE, original=TUNED, exported=TUNED + np.float32(0.1), stored_as="bfloat16")
    assert comparison.holds
    assert "bfloat16" in comparison.reason


def test_builtin_texts_are_scored_in_full_behind_one_bos() -> None:
    tokenizer = tiny_tokenizer()
    rows = builtin_rows(tokenizer)
    assert len(rows) == len(TEXTS)
    for row, text in zip(rows, TEXTS, strict=True):
        assert row.input_ids[0] == tokenizer.bos_id
        assert tokenizer.decode(row.input_ids.tolist()) == text
        assert row.loss_mask.tolist() == [False] + [True] * (len(row) - 1)


def test_validation_rows_are_preferred_and_cut() -> None:
    tokenizer = tiny_tokenizer()
    [long] = [
        EncodedRow(np.tile(row.input_ids, 9), np.tile(row.loss_mask, 9), row.origin)
        for row in builtin_rows(tokenizer)[:1]
    ]
    untrained = EncodedRow(long.input_ids, np.zeros_like(long.loss_mask), long.origin)
    assert [len(row) for row in probe_rows([untrained, long], tokenizer)] == [PROBE_TOKENS]
    assert len(probe_rows([untrained], tokenizer)) == len(TEXTS)


def test_logprobs_are_those_of_trained_tokens_alone() -> None:
    tokenizer = tiny_tokenizer()
    rows = builtin_rows(tokenizer)
    batches = list(evaluation_batches(rows, max_rows=2, max_tokens=None, pad_id=tokenizer.pad_id))
    session = BigramSession(table({}), {"tuned": table(chain("ab"))})

    values = logprobs(session, batches)

    assert len(values) == sum(len(row) - 1 for row in rows)
    assert np.ptp(values) < 1e-6
    assert np.ptp(logprobs(session, batches, adapter="tuned")) > 1

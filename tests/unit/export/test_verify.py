"""What counts as "answers like the original"."""

import numpy as np
import pytest
from tests.support.fake_inference import BigramSession, chain, table
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.data.batching import evaluation_batches
from finetune.data.rows import EncodedRow
from finetune.export.probes import PROBE_TOKENS, TEXTS, builtin_rows, probe_rows
from finetune.export.verify import LARGEST_SHARE, TOLERANCES, Comparison, Scores, compare, mean_divergence, scores

BASE = np.array([-1.0, -2.0, -3.0], dtype=np.float32)
TUNED = np.array([-0.5, -1.0, -3.0], dtype=np.float32)
ALIKE = np.log(np.full((2, 4), 0.25, np.float32))


def judged(exported: np.ndarray, *, stored_as: str = "float32") -> Comparison:
    """Only the targets' log-probabilities differ."""
    scores = [Scores(targets, ALIKE) for targets in (BASE, TUNED, exported)]
    base, original, export = scores
    return compare(base=base, original=original, exported=export, stored_as=stored_as, requantised=False)


def requantised(share: float) -> Comparison:
    """The export's predictions lie between the tuned model's (0) and the base's (1)."""
    logits = np.random.default_rng(0).normal(size=(5, 300))
    change = 0.01 * np.random.default_rng(1).normal(size=(5, 300))
    base, original, exported = (_normalised(logits + part * change) for part in (0.0, 1.0, 1.0 - share))
    found = [Scores(array[:, 0], array) for array in (base, original, exported)]
    return compare(base=found[0], original=found[1], exported=found[2], stored_as="bfloat16", requantised=True)


def _normalised(logits: np.ndarray) -> np.ndarray:
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def test_the_largest_difference_decides() -> None:
    close = judged(TUNED + np.float32(5e-5))
    far = judged(TUNED + np.float32([0, 0, 2e-4]))
    assert close.holds
    assert not far.holds
    assert far.largest_difference == pytest.approx(2e-4, rel=1e-2)


def test_an_export_that_lost_the_tuning_is_found() -> None:
    comparison = judged(BASE)
    assert not comparison.holds
    assert comparison.largest_difference == comparison.adapter_effect == 1.0


@pytest.mark.parametrize("stored_as", TOLERANCES)
def test_a_number_that_is_none_never_passes(stored_as: str) -> None:
    assert not judged(TUNED * np.float32("nan"), stored_as=stored_as).holds
    gone = Scores(TUNED, np.full_like(ALIKE, np.nan))
    whole = Scores(TUNED, ALIKE)
    assert not compare(base=whole, original=whole, exported=gone, stored_as=stored_as, requantised=True).holds


def test_half_of_a_small_change_is_a_quarter_of_its_divergence() -> None:
    """KL grows with the square of a small change; 0.01 is small to about one percent."""
    assert requantised(0.5).divergence.share == pytest.approx(LARGEST_SHARE, rel=0.03)
    assert requantised(0.45).holds
    assert not requantised(0.55).holds
    assert requantised(0.0).divergence.exported == 0.0


def test_the_divergence_is_the_one_of_the_textbook() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert mean_divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32)) == pytest.approx(expected)


def test_rounded_weights_are_allowed_more_and_the_reason_is_given() -> None:
    comparison = judged(TUNED + np.float32(0.1), stored_as="bfloat16")
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

    found = scores(session, batches)
    values = found.targets

    assert len(values) == sum(len(row) - 1 for row in rows)
    assert np.ptp(values) < 1e-6
    assert np.ptp(scores(session, batches, adapter="tuned").targets) > 1
    assert found.distributions.shape == (len(values), 261)


def test_distributions_are_taken_at_a_bounded_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    batches = list(evaluation_batches(builtin_rows(tokenizer), max_rows=1, max_tokens=None, pad_id=tokenizer.pad_id))
    monkeypatch.setattr("finetune.export.verify._DISTRIBUTION_ELEMENTS", 3 * 261 * len(batches))
    session = BigramSession(table({}), {})
    assert len(scores(session, batches).distributions) == 3 * len(batches)

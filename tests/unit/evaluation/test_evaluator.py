"""Evaluation over a bigram model: sums, not means of means; base and adapter in one session."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.support.fake_inference import BOS, EOS, VOCABULARY, BigramSession, ByteTokenizer, chain, table

from finetune.data.rows import EncodedRow, Origin
from finetune.evaluation.evaluator import Evaluator, Question
from finetune.generation.requests import Prompt


def row(text: str, *, trained: int) -> EncodedRow:
    """A row whose last `trained` tokens are trained on."""
    ids = np.array([BOS, *text.encode(), EOS], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[-trained:] = True
    return EncodedRow(ids, mask, Origin("rows.jsonl", 1))


def question(expected: str) -> Question:
    return Question(Prompt("", (BOS,), frozenset({EOS})), expected, len(expected))


ROWS = [row("abc", trained=2), row("a", trained=1), row("a longer row", trained=9), row("xy", trained=3)]
EVALUATOR = Evaluator(ROWS, [], ByteTokenizer(), None)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8])
def test_the_loss_does_not_depend_on_the_batch_size(max_rows: int) -> None:
    session = BigramSession(table(chain("abc")))
    one_by_one = replace(EVALUATOR, max_rows=1).scores(session)
    scores = replace(EVALUATOR, max_rows=max_rows).scores(session)
    assert scores.loss == pytest.approx(one_by_one.loss, rel=1e-6)
    assert (scores.tokens, scores.accuracy) == (15, one_by_one.accuracy)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    scores = EVALUATOR.scores(BigramSession(table({})))
    assert scores.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert scores.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert scores.exact_match is None


def test_base_and_adapter_answer_the_same_questions_in_one_session() -> None:
    session = BigramSession(table(chain("wrong")), {"tuned": table(chain("right"))})
    evaluator = replace(EVALUATOR, questions=[question("right"), question("other")])

    base, tuned = evaluator.scores(session), evaluator.scores(session, adapter="tuned")

    assert base.answers == ("wrong", "wrong")
    assert tuned.answers == ("right", "right")
    assert (base.exact_match, tuned.exact_match) == (0.0, 0.5)
    assert {adapter for adapter, _ in session.calls} == {None, "tuned"}


def test_the_continuation_of_a_text_is_shown_but_not_judged() -> None:
    text = replace(question("right"), is_answer=False)
    session = BigramSession(table(chain("right")))
    assert replace(EVALUATOR, questions=[text]).scores(session).exact_match is None
    assert replace(EVALUATOR, questions=[text, question("other")]).scores(session).exact_match == 0.0


def test_an_answer_that_does_not_end_is_cut_soon_after_the_expected_length() -> None:
    endless = BigramSession(table({BOS: ord("a"), ord("a"): ord("a")}))
    scores = replace(EVALUATOR, questions=[question("aaaa")]).scores(endless)
    assert scores.answers == ("a" * (2 * 4 + 16),)
    assert scores.exact_match == 0.0


def test_progress_counts_every_row_once() -> None:
    seen: list[int] = []
    replace(EVALUATOR, max_rows=3).scores(BigramSession(table({})), progress=seen.append)
    assert seen[-1] == len(ROWS)

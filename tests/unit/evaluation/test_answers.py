"""Figures of answers, checked by hand and against what the libraries say of the same texts."""

import json

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from finetune.evaluation import answers
from finetune.evaluation.answers import AnswerFigures, figures_of, overlap_scorer, parsed_json, score_answer


@pytest.mark.parametrize(
    ("answer", "valid", "equal"),
    [
        ('{"a": 1, "b": [true, null]}', True, True),
        ('{"b": [true, null], "a": 1.0}', True, True),
        ('  {"b":[true,null],"a":1}\n', True, True),
        ('{"a": true, "b": [true, null]}', True, False),
        ('{"a": 1, "b": [null, true]}', True, False),
        ('{"a": 1, "b": [true, null]} done', False, False),
        ('{"a": NaN}', False, False),
        ("1", False, False),
        ("[" * 100_000, False, False),
        ("", False, False),
    ],
)
def test_json_is_equal_whatever_the_order_of_keys_and_the_white_space(answer: str, valid: bool, equal: bool) -> None:
    score = score_answer(answer, '{"a": 1, "b": [true, null]}')
    assert (score.json_valid, score.json_equal) == (valid, equal)


def test_json_is_asked_for_only_where_it_is_expected() -> None:
    score = score_answer('{"a": 1}', "a word")
    assert (score.json_valid, score.json_equal) == (None, None)
    assert parsed_json("42") is None
    mixed = [score_answer("{}", "{}"), score_answer("no", "{}"), score_answer("word", "word")]
    figures = figures_of(mixed, ["{}", "no", "word"], ["{}", "{}", "word"])
    assert (figures.json_valid, figures.exact_match) == (0.5, pytest.approx(2 / 3))


def test_overlap_is_what_the_libraries_measure() -> None:
    expected = ["the cat sat on the mat today", "a quick brown fox"]
    given = ["the cat is on the mat today", "a slow brown fox"]
    overlap = overlap_scorer()
    scores = [score_answer(*pair, overlap) for pair in zip(given, expected, strict=True)]
    figures = figures_of(scores, given, expected)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    theirs = [scorer.score(target, answer)["rougeL"].fmeasure for answer, target in zip(given, expected, strict=True)]
    assert figures.rouge_l == pytest.approx(sum(theirs) / 2)
    assert figures.rouge1 == pytest.approx((6 / 7 + 3 / 4) / 2)  # words that both have, of as many in each
    assert figures.bleu == pytest.approx(sacrebleu.corpus_bleu(given, [expected]).score)


def test_without_the_libraries_their_figures_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    assert overlap_scorer() is None
    figures = figures_of([score_answer("a", "a")], ["a"], ["a"])
    assert (figures.exact_match, figures.rouge1, figures.bleu) == (1.0, None, None)


def test_no_answers_have_no_figures() -> None:
    assert figures_of([], [], []) == AnswerFigures()


def test_json_numbers_are_compared_as_numbers() -> None:
    assert json.loads(parsed_json('{"a": [1.0, 2.5]}') or "") == {"a": [1, 2.5]}
    assert parsed_json('{"a": 1e999}') != parsed_json('{"a": 1}')

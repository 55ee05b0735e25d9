"""Figures, checked by hand."""

import math

import pytest

from finetune.evaluation.metrics import is_exact_match, perplexity


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert perplexity(math.log(7.0)) == pytest.approx(7.0)
    assert perplexity(0.0) == 1.0


def test_perplexity_of_an_absurd_loss_is_infinite_and_not_an_error() -> None:
    assert perplexity(1e6) == math.inf


def test_an_answer_must_match_as_a_whole_and_white_space_around_it_does_not_count() -> None:
    assert is_exact_match(' {"a": 1}\n', '{"a": 1}')
    assert not is_exact_match('{"a": 1} and more', '{"a": 1}')
    assert not is_exact_match('{"a":1}', '{"a": 1}')

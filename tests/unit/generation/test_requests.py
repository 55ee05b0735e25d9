"""Requests through a bigram model: ends, limits, seeds, order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fake_inference import BOS, EOS, BigramGenerator, ByteTokenizer, chain, table

from finetune.core.errors import UsageError
from finetune.core.types import Sampling
from finetune.generation.requests import (
    TOGETHER,
    Answer,
    AnswerOptions,
    Prompt,
    TextPiece,
    TextRequest,
    answer_all,
    check_options,
    fit_to_context,
    in_order,
    stream,
)


def prompt(text: str = "") -> Prompt:
    return Prompt(text=text, ids=(BOS, *text.encode()), stop_tokens=frozenset({EOS}))


def spelling(text: str) -> BigramGenerator:
    return BigramGenerator({None: table(chain(text))})


def test_an_answer_ends_before_the_stop_token() -> None:
    [answer] = answer_all(spelling("Hi you"), [TextRequest(prompt())], ByteTokenizer())
    assert (answer.text, answer.finish_reason) == ("Hi you", "stop")
    assert answer.tokens == tuple(b"Hi you")


def test_an_answer_ends_after_max_tokens() -> None:
    [answer] = answer_all(spelling("Hi you"), [TextRequest(prompt(), AnswerOptions(max_tokens=3))], ByteTokenizer())
    assert (answer.text, answer.finish_reason) == ("Hi ", "length")


def test_a_stop_string_over_several_tokens_ends_the_answer_and_frees_the_request() -> None:
    generator = spelling("abcdefg")
    [answer] = answer_all(generator, [TextRequest(prompt(), AnswerOptions(stop=("cde",)))], ByteTokenizer())
    assert (answer.text, answer.finish_reason) == ("ab", "stop")
    assert generator.cancelled == [1]
    assert generator.step() == []


def test_text_that_might_have_become_a_stop_string_is_shown_at_the_end() -> None:
    [answer] = answer_all(spelling("abc"), [TextRequest(prompt(), AnswerOptions(stop=("cd",)))], ByteTokenizer())
    assert (answer.text, answer.finish_reason) == ("abc", "stop")


def test_many_requests_keep_their_order_and_only_some_run_together() -> None:
    generator = spelling("abcdefg")
    limits = [1 + n % 5 for n in range(3 * TOGETHER)]
    requests = [TextRequest(prompt(), AnswerOptions(max_tokens=limit)) for limit in limits]

    answers = answer_all(generator, requests, ByteTokenizer())

    assert [answer.text for answer in answers] == ["abcdefg"[:limit] for limit in limits]
    assert generator.active_at_most == TOGETHER


def test_each_request_has_its_adapter_and_its_seed() -> None:
    generator = BigramGenerator({None: table(chain("base")), "tuned": table(chain("tuned"))})
    requests = [TextRequest(prompt()), TextRequest(prompt(), AnswerOptions(sampling=Sampling(seed=7)), "tuned")]

    answers = answer_all(generator, requests, ByteTokenizer())

    assert [answer.text for answer in answers] == ["base", "tuned"]
    assert [request.sampling.seed for request in generator.seen] == [0, 7]


def test_the_same_seed_gives_the_same_sample_and_another_seed_another() -> None:
    def sample(seed: int) -> str:
        options = AnswerOptions(max_tokens=20, sampling=Sampling(temperature=1.0, seed=seed))
        return answer_all(BigramGenerator({None: table({})}), [TextRequest(prompt(), options)], ByteTokenizer())[0].text

    assert sample(1) == sample(1) != sample(2)


def test_leaving_a_stream_early_cancels_what_is_left() -> None:
    generator = spelling("abcdefg")
    pieces = stream(generator, [TextRequest(prompt()), TextRequest(prompt())], ByteTokenizer())
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert generator.cancelled == [1, 2]


def test_max_tokens_is_lowered_to_the_room_in_the_context() -> None:
    request = TextRequest(prompt("1234"), AnswerOptions(max_tokens=100))
    assert fit_to_context(request, 12).options.max_tokens == 7
    assert fit_to_context(request, None).options.max_tokens == 100


def test_a_prompt_that_fills_the_context_is_refused_with_both_counts() -> None:
    with pytest.raises(UsageError, match=r"5 tokens .* context is 5"):
        fit_to_context(TextRequest(prompt("1234")), 5)


def test_all_wrong_options_are_named_at_once() -> None:
    options = AnswerOptions(max_tokens=0, sampling=Sampling(temperature=-1.0, top_p=0.0), stop=("",))
    with pytest.raises(UsageError) as caught:
        check_options(options)
    assert all(name in str(caught.value) for name in ["--max-tokens 0", "--temperature -1", "--top-p 0.0", "--stop"])


def test_a_limit_that_greedy_decoding_would_ignore_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--top-p, --top-k would do nothing at temperature 0"):
        check_options(AnswerOptions(sampling=Sampling(top_p=0.9, top_k=5)))
    check_options(AnswerOptions(sampling=Sampling(temperature=0.7, top_p=0.9, top_k=5)))


@given(st.permutations([0, 0, 1, 1, 2, 2, 3]))
def test_pieces_in_order_are_those_of_one_request_after_the_other(order: list[int]) -> None:
    left = {index: order.count(index) for index in order}
    pieces = []
    for index in order:
        left[index] -= 1
        answer = None if left[index] else Answer("", (), "stop")
        pieces.append(TextPiece(index, f"{index}.{left[index]}", answer))
    ordered = list(in_order(iter(pieces)))
    assert [piece.text for piece in ordered] == ["0.1", "0.0", "1.1", "1.0", "2.1", "2.0", "3.0"]

"""One answer from its events: text, the tokens that belong to each piece, and why it ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fake_inference import EOS, ByteTokenizer

from finetune.core.types import TokenEvent
from finetune.generation.answers import AnswerText, Piece


def events(text: str, *, reason: str | None = "length") -> list[TokenEvent]:
    """A token for each byte, with its number as log-probability; the last one has the reason."""
    data = text.encode()
    last = len(data) - 1
    return [TokenEvent(0, byte, -float(i), reason if i == last else None) for i, byte in enumerate(data)]  # type: ignore[arg-type]


def pieces_of(answer: AnswerText, given: list[TokenEvent]) -> list[Piece]:
    pieces = []
    for event in given:
        pieces.append(answer.take(event))
        if pieces[-1].finish_reason:
            break
    return pieces


@given(st.text(min_size=1, max_size=40), st.sampled_from([(), ("😀",), ("b", "ab"), ("\n\n",)]))
def test_an_answer_is_the_text_before_the_first_stop_string(text: str, stops: tuple[str, ...]) -> None:
    pieces = pieces_of(AnswerText(ByteTokenizer(), [], stops), events(text))
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert "".join(piece.text for piece in pieces) == (text[: min(places)] if places else text)
    assert pieces[-1].finish_reason == ("stop" if places else "length")
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@given(st.text(min_size=1, max_size=30))
def test_each_token_comes_once_and_says_where_its_text_begins(text: str) -> None:
    pieces = pieces_of(AnswerText(ByteTokenizer(), [], ["|||"]), events(text.replace("|", "")) or events("x"))
    tokens = [token for piece in pieces for token in piece.tokens]
    assert bytes(token.id for token in tokens).decode() == (text.replace("|", "") or "x")
    assert [token.logprob for token in tokens] == [-float(i) for i in range(len(tokens))]
    assert [token.start for token in tokens] == sorted(token.start for token in tokens)


def test_tokens_of_a_stop_string_are_not_handed_out() -> None:
    pieces = pieces_of(AnswerText(ByteTokenizer(), [], ["END"]), events("4END and more"))
    assert [token.id for piece in pieces for token in piece.tokens] == [ord("4")]


@pytest.mark.parametrize("held", ["E", "EN"])
def test_text_held_back_for_a_stop_string_comes_with_the_end(held: str) -> None:
    answer = AnswerText(ByteTokenizer(), [], ["END"])
    shown = [answer.take(event) for event in events(held, reason=None)]
    last = answer.take(TokenEvent(0, None, -1.0, "stop"))
    assert [piece.text for piece in shown] == [""] * len(held)
    assert (last.text, last.finish_reason, len(last.tokens)) == (held, "stop", len(held))


def test_special_tokens_are_no_text() -> None:
    answer = AnswerText(ByteTokenizer(), [])
    assert answer.take(TokenEvent(0, EOS, 0.0)).text == ""
    assert answer.take(TokenEvent(0, ord("a"), 0.0, "length")).text == "a"

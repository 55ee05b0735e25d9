"""Streaming text: whole characters, right spaces, and nothing past a stop string."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fake_inference import ByteTokenizer
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from finetune.generation.text import StopStrings, TextStream


def test_a_character_spread_over_tokens_comes_whole() -> None:
    stream = TextStream(ByteTokenizer(), [])

    assert [stream.add(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]


@given(st.text(max_size=60))
def test_pieces_add_up_to_the_text_and_none_holds_half_a_character(text: str) -> None:
    stream = TextStream(ByteTokenizer(), list(b"before "))

    pieces = [stream.add(byte) for byte in text.encode()]

    assert "".join(pieces) + stream.finish() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in text


def test_an_answer_that_ends_inside_a_character_says_so() -> None:
    stream = TextStream(ByteTokenizer(), [])
    assert stream.add("€".encode()[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_are_given_out_and_cost_no_more_with_each() -> None:
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting()
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(0xFF) for _ in range(200)]
    assert "".join(pieces) + stream.finish() == "\N{REPLACEMENT CHARACTER}" * 200
    assert tokenizer.longest < 60


def test_decoding_a_token_does_not_become_slower_with_the_answer() -> None:
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting()
    stream = TextStream(tokenizer, [])
    text = "grüße " * 200
    assert "".join(stream.add(byte) for byte in text.encode()) == text
    assert tokenizer.longest < 60


class _RealVocabulary:
    """A vocabulary of the shared material: SentencePiece with bytes (stories260K) or byte-level BPE (qwen3)."""

    def __init__(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
            self.tokenizer = ByteLevelBPETokenizer.from_file(*files)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))


NASTY = (
    " été 😀😀😀😀😀😀😀😀 in 北京.\n\n  x = {'a': 1}\n" * 3
    + "e\u0301\u0323 👩‍👩‍👧‍👦🏳️‍🌈 नमस्ते\u200d\ufeff\t ﷽\U0001d54f"
)


@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/qwen3", "tokenizers/gpt2_117M"])
@pytest.mark.parametrize("text", ["Once upon  a time", NASTY], ids=["plain", "nasty"])
def test_pieces_of_a_real_vocabulary_add_up_to_its_text(shared: Path, name: str, text: str) -> None:
    vocabulary = _RealVocabulary(shared / name)
    ids = vocabulary.tokenizer.encode("The prompt." + text).ids
    cut = len(vocabulary.tokenizer.encode("The prompt.").ids)
    stream = TextStream(vocabulary, ids[:cut])

    pieces = [stream.add(token) for token in ids[cut:]]

    assert "".join(pieces) + stream.finish() == vocabulary.decode(ids)[len(vocabulary.decode(ids[:cut])) :]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_stop_string_is_found_across_pieces_and_never_shown() -> None:
    stops = StopStrings(["</answer>"])
    shown = [stops.add(piece) for piece in ["4", "2</", "ans", "wer", ">more"]]
    assert shown == ["4", "2", "", "", ""]
    assert stops.found


def test_text_that_only_begins_like_a_stop_string_is_given_out() -> None:
    stops = StopStrings(["</answer>", "\n\n"])
    assert [stops.add(piece) for piece in ["a\n", "b </an", "d"]] == ["a", "\nb ", "</and"]
    assert stops.add("\n") == ""
    assert stops.finish() == "\n"
    assert not stops.found


@given(st.text(alphabet="ab|", max_size=30), st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_cutting_at_a_stop_string_does_not_depend_on_the_pieces(text: str, sizes: list[int]) -> None:
    stops, shown, rest = StopStrings(["|a", "ab|b"]), "", text
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        if not stops.found:
            shown += stops.add(piece)
    shown += stops.finish()

    places = [place for stop in ("|a", "ab|b") if (place := text.find(stop)) >= 0]
    assert shown == (text[: min(places)] if places else text)

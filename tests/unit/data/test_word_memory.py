"""Tokens from memory are those of the `tokenizers` library, ids and character ranges."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import tiny_backend
from tokenizers import Tokenizer

from finetune.data.tokenizer import TextTokenizer
from finetune.data.word_memory import GPT2_PATTERN, KNOWN_PATTERNS, WordMemory

DEMO = Path(str(resources.files("finetune.demo"))) / "model" / "tokenizer.json"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im_")
TEXTS = st.lists(
    st.sampled_from([*map(chr, range(128)), *"   \n\n", "\r\n", "'s", "'LL", " the", "the", " 2024", "  ", *SPECIAL])
).map("".join)


def backend_with(pattern: str) -> Tokenizer:
    """The demo model's vocabulary, with another way to cut text."""
    rules = json.loads(DEMO.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    if pattern == GPT2_PATTERN:
        rules["pre_tokenizer"] = byte_level | {"use_regex": True}
    return Tokenizer.from_str(json.dumps(rules))


BACKENDS = {pattern: backend_with(pattern) for pattern in sorted(KNOWN_PATTERNS)}


@pytest.mark.parametrize("pattern", BACKENDS)
@settings(max_examples=150)
@given(text=TEXTS)
def test_ascii_text_gets_the_ids_and_ranges_of_the_library(pattern, text):
    expected = BACKENDS[pattern].encode(text, add_special_tokens=False)
    found = WordMemory.of(BACKENDS[pattern]).encode(text)

    assert found[0].tolist() == expected.ids
    assert [tuple(pair) for pair in found[1].tolist()] == expected.offsets


def test_other_text_is_left_to_the_library():
    assert WordMemory.of(BACKENDS[GPT2_PATTERN]).encode("caf\u00e9") is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
    ],
    ids=["normalizer", "post-processor", "pre-tokenizer"],
)
def test_a_tokenizer_that_does_more_is_left_to_the_library(change):
    rules = json.loads(BACKENDS[GPT2_PATTERN].to_str())

    assert WordMemory.of(Tokenizer.from_str(json.dumps(rules | change))) is None


def test_one_that_merges_across_words_is_left_to_the_library():
    assert WordMemory.of(tiny_backend()) is None


def test_a_batch_may_hold_text_of_both_kinds():
    tokenizer = TextTokenizer.open(DEMO.parent)
    texts = ["plain text", "caf\u00e9 \u2603", "", "more of it"]
    for (ids, offsets), text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text)[0])
        assert tokenizer.decode(ids) == text
        assert (offsets[-1, 1] if len(ids) else 0) == len(text)

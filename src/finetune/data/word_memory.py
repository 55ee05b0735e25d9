"""Tokens of text in ASCII, word by word from memory, for byte-level BPE tokenizers.

Such a tokenizer cuts text into words by a fixed pattern, and encodes each word by itself. Words repeat, so their
tokens are looked up; a new word is encoded by the tokenizer itself. Text with other characters, and tokenizers of
another kind, are left to the `tokenizers` library, which does the same several times slower.
"""

import json
import re
from typing import Any

import numpy as np

from finetune.core.types import IntArray
from finetune.data.buffers import empty

_MOST_WORDS = 50_000  # about 10 MB
_LONGEST_WORD = 32  # characters; longer ones hardly come again

# How GPT-2, Qwen 2 and Llama 3 cut text, and most others with them.
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LIKE_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = frozenset({GPT2_PATTERN, _LIKE_QWEN + r"\p{N}|" + _TAIL, _LIKE_QWEN + r"\p{N}{1,3}|" + _TAIL})
_PROBE = "I'LL say: it's 12345 o'clock\t\n\n  (a+b)==c?!  \r\n x_y\x0b\x1c #tag 3.14e-5 'quoted'  end \n "
_IN_ASCII = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9", r"\s": r"\t-\r ", r"\S": r"\x00-\x08\x0e-\x1f!-\x7f"}


class WordMemory:
    """Encodes ASCII text as `backend` does. Make it with `of`."""

    def __init__(self, backend: Any, pattern: str) -> None:
        self._backend = backend
        self._words = re.compile(in_ascii(pattern))
        self._ids: dict[str, tuple[int, ...]] = {}
        added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)  # characters that a token stands for
        for text, number in vocabulary.items():
            self._lengths[number] = len(text)

    @classmethod
    def of(cls, backend: Any) -> "WordMemory | None":
        """None for a tokenizer that does more than to cut by a known pattern and to merge bytes."""
        rules = json.loads(backend.to_str())
        pattern = _pattern(rules["pre_tokenizer"] or {})
        model, normalizer, post = rules["model"], rules["normalizer"], rules["post_processor"]
        suits = (
            pattern in KNOWN_PATTERNS
            and model["type"] == "BPE"
            and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            and (normalizer is None or normalizer["type"] == "NFC")  # which changes nothing in ASCII
            and (post is None or post["type"] == "TemplateProcessing")  # which only adds special tokens
            and not any(token[key] for token in rules["added_tokens"] for key in ("lstrip", "rstrip", "single_word"))
        )
        memory = cls(backend, pattern) if suits and pattern else None
        return memory if memory and memory._agrees() else None

    def _agrees(self) -> bool:
        """Whether the library still cuts as it did when the patterns were written down."""
        expected, found = self._backend.encode(_PROBE, add_special_tokens=False), self.encode(_PROBE)
        return found is not None and (found[0].tolist(), found[1].tolist()) == (
            expected.ids,
            [list(place) for place in expected.offsets],
        )

    def encode(self, text: str) -> tuple[IntArray, IntArray] | None:
        """Token ids [n] and character ranges [n, 2]; None for text that is not all ASCII."""
        if not text.isascii():
            return None
        found: list[int] = []
        for part in self._cut.split(text) if self._cut else (text,):
            if part in self._added:
                found.append(self._added[part])
                continue
            for word in self._words.findall(part):
                found += self._ids.get(word) or self._new(word)
        ids, ranges = empty(len(found), np.int32), empty(2 * len(found), np.int32).reshape(2, len(found))
        starts, ends = ranges
        ids[:] = found
        lengths = np.take(self._lengths, ids, out=starts, mode="clip")  # which needs no copy, and clips nothing
        np.cumsum(lengths, out=ends)
        if (int(ends[-1]) if len(ends) else 0) != len(text):  # a byte that the vocabulary lacks
            return None
        np.subtract(ends, lengths, out=starts)
        return ids, ranges.T

    def _new(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._backend.encode(word, add_special_tokens=False).ids)
        if len(word) <= _LONGEST_WORD:
            if len(self._ids) >= _MOST_WORDS:
                self._ids.clear()
            self._ids[word] = ids
        return ids


def in_ascii(pattern: str) -> str:
    """A pattern in the syntax of `re`, with the same matches in ASCII text."""
    inside, pieces = False, list[str]()
    for piece in re.findall(r"\\[pP]\{\w\}|\\.|.", pattern):
        inside = piece == "[" or (inside and piece != "]")
        meaning = _IN_ASCII.get(piece)
        pieces.append(piece if meaning is None else meaning if inside else f"[{meaning}]")
    return "".join(pieces)


def _pattern(rules: dict[str, Any]) -> str | None:
    """The pattern of a pre-tokenizer that only cuts, and writes bytes as letters."""
    parts = rules.get("pretokenizers", [rules])
    *cuts, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return None if cuts else GPT2_PATTERN
    [cut] = cuts if len(cuts) == 1 else [{}]
    isolated = cut.get("type") == "Split" and cut.get("behavior") == "Isolated" and not cut.get("invert")
    return str(cut["pattern"].get("Regex")) if isolated else None

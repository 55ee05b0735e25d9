"""Near duplicates: what is found agrees with comparing every text with every other."""

import re
import time
from itertools import combinations

import numpy as np
import pytest

from finetune.data.near import near_groups

WORDS = [f"word{number}" for number in range(2_000)]


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))} if words else set()


def by_brute_force(texts: list[str], similarity: float) -> set[tuple[int, int]]:
    """All pairs that are similar enough."""
    sets = [runs(text) for text in texts]
    return {
        (a, b)
        for a, b in combinations(range(len(texts)), 2)
        if sets[a] and sets[b] and len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= similarity
    }


def connected(pairs: set[tuple[int, int]]) -> list[list[int]]:
    """Groups of positions that pairs join, in the order of their first members."""
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched] + [set(pair).union(*touched)]
    return sorted(sorted(group) for group in groups)


def variants(count: int, seed: int) -> list[str]:
    """Texts of 60 words, each with two relatives of which some words are others."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = list(rng.choice(WORDS, 60))
        for changes in (0, 1, 4):
            copy = list(words)
            for place in rng.choice(60, changes, replace=False):
                copy[place] = "other"
            texts.append(" ".join(copy))
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_comparing_all_pairs(seed: int) -> None:
    texts = variants(60, seed)
    pairs = by_brute_force(texts, 0.8)
    assert len(pairs) > 50
    assert [members.tolist() for members in near_groups(texts)] == connected(pairs)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Hello, World! How are you?", "hello world how are YOU"], [[0, 1]]),
        (["yes", "yes", "no"], [[0, 1]]),
        (["", "...", "!"], []),
        (["one two three four", "five six seven eight"], []),
    ],
)
def test_case_and_punctuation_do_not_count_and_texts_without_words_are_left_out(
    texts: list[str], expected: list[list[int]]
) -> None:
    assert [members.tolist() for members in near_groups(texts)] == expected


def test_many_equal_texts_take_no_more_time_than_different_ones() -> None:
    start = time.process_time()
    [members] = near_groups(["the same words in every single row of this file"] * 5_000)
    assert members.tolist() == list(range(5_000))
    assert time.process_time() - start < 20  # comparing all pairs would take minutes

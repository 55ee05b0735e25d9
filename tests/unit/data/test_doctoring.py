"""Suspicious rows are named, each with what shows it."""

from typing import Any

import numpy as np
import pytest
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.data import doctoring
from finetune.data.doctoring import Found
from finetune.data.rows import Example, Message, Origin
from finetune.data.templates import Template


def rows(*pairs: tuple[str, str], label: bool | None = None, file: str = "a") -> list[Example]:
    return [
        Example(Origin(file, line), (Message("user", ask), Message("assistant", answer)), desirable=label)
        for line, (ask, answer) in enumerate(pairs, start=1)
    ]


def places(findings: Found) -> list[tuple[str, ...]]:
    return [finding.rows for finding in findings.findings]


LONG = "please tell me in a few short sentences how the weather is going to be in the north tomorrow"


def test_the_same_request_with_both_labels_is_found() -> None:
    examples = rows(("hi", "x"), ("ho", "y"), label=True) + rows(("hi", "z"), label=False, file="b")
    [finding] = doctoring.both_labels(examples).findings
    assert finding.rows == ("a:1", "b:1")
    assert finding.detail == "hi"


def test_the_same_request_with_different_answers_is_found_and_copies_are_not() -> None:
    examples = rows(("hi", "x"), ("hi", "y"), ("ho", "z"), ("ho", "z"))
    assert places(doctoring.different_answers(examples)) == [("a:1", "a:2")]


def test_an_answer_depends_on_the_turns_and_tools_before_it() -> None:
    first = [Message("user", "hi"), Message("assistant", "a"), Message("user", "more")]
    examples = [
        Example(Origin("a", 1), (*first, Message("assistant", "x"))),
        Example(Origin("a", 2), (*first[:1], Message("assistant", "b"), first[2], Message("assistant", "y"))),
        Example(Origin("a", 3), (*first, Message("assistant", "x")), tools=({"name": "t"},)),
    ]
    assert doctoring.different_answers(examples).count == 0


def test_an_undesirable_answer_is_no_other_answer() -> None:
    examples = rows(("hi", "x"), label=True) + rows(("hi", "y"), label=False, file="b")
    assert doctoring.different_answers(examples).count == 0


def test_exact_and_near_copies_are_told_apart() -> None:
    examples = rows((LONG, "rain"), (LONG, "rain"), (LONG + " please", "rain"), ("something else entirely", "no"))
    assert places(doctoring.exact_copies(examples)) == [("a:1", "a:2")]
    assert places(doctoring.near_copies(examples)) == [("a:1", "a:3")]


def test_requests_of_the_validation_rows_that_are_trained_on_are_leaks() -> None:
    trained = rows((LONG, "rain"), ("an unrelated request about trains", "yes"))
    held_out = rows((LONG, "sun"), (LONG + " please", "sun"), ("nothing of the kind", "no"), file="v")
    assert places(doctoring.leaks(trained, held_out)) == [("v:1", "a:1"), ("v:2", "a:1")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ["user: Hi there", "assistant: Well"]),
        ("{% for m in messages %}{{ m.content[:4] }}{% endfor %}", ["user: Hi there", "assistant: Well"]),
        ("{{ messages[-1].content }}", ["user: Hi there"]),
    ],
)
def test_messages_that_a_template_changes_are_named(source: str, expected: list[str]) -> None:
    template = Template("t", source, tiny_tokenizer())
    examples = rows(("Hi there", "<think>hm</think>\nWell"))
    assert [finding.detail for finding in doctoring.mangled(examples, template).findings] == expected


class Forgetful:
    """A tokenizer that knows no letter beyond ASCII."""

    def encode(self, text: str) -> tuple[Any, Any]:
        return np.array([min(ord(letter), 128) for letter in text]), None

    def decode(self, ids: list[int], *, skip_special: bool) -> str:
        return "".join(chr(token) if token < 128 else "?" for token in ids)


def test_characters_that_a_tokenizer_loses_are_shown() -> None:
    tokenizer: Any = Forgetful()
    examples = rows(("plain", "text"), ("a café?", "no"), ("x", "日本 is far"))
    found = doctoring.lossy(examples, tokenizer)
    assert places(found) == [("a:2",), ("a:3",)]
    assert found.findings[0].detail == "'é?' comes back as '??'"

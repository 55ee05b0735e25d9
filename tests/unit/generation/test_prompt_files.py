"""Prompts of a file: lines of text, JSON rows, and what is said about rows that are none."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.errors import DataError, FinetuneError
from finetune.data.rows import Message
from finetune.generation.prompt_files import parse_prompts, read_prompts

PIPE = Path("standard input")


def test_lines_of_text_are_prompts_and_blank_ones_are_none() -> None:
    asked = parse_prompts(PIPE, "One?\n\n  \nTwo {x}?\r\n")
    assert [(one.text, str(one.origin)) for one in asked] == [
        ("One?", "standard input:1"),
        ("Two {x}?", "standard input:4"),
    ]


def test_json_rows_have_a_prompt_or_messages(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "system": "Be brief."},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "label": 3},
        "Just text",
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    asked = read_prompts(file)
    assert [(one.text, one.system) for one in asked] == [("Hi", "Be brief."), ("", None), ("Just text", None)]
    assert asked[1].messages == (Message("system", "S"), Message("user", "Q"))
    assert parse_prompts(PIPE, text)[0].text == "Hi"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "needs either"),
        ({"prompt": "a", "messages": []}, "needs either"),
        ({"prompt": 3}, "`prompt` is not a text"),
        ({"prompt": "a", "system": ["b"]}, "`system` is not a text"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "end with an answer"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "boss"),
    ],
)
def test_every_row_that_is_no_prompt_is_named_with_its_line(row: object, reason: str) -> None:
    text = "\n".join([json.dumps({"prompt": "fine"}), json.dumps(row), json.dumps(row)])
    with pytest.raises(DataError, match=f"2 rows that are no prompt:\n  standard input:2: .*{reason}"):
        parse_prompts(PIPE, text)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="has no prompt"):
        parse_prompts(PIPE, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")


@given(st.text(max_size=60), st.sampled_from([True, False, None]))
def test_any_text_is_read_or_refused_with_a_message(text: str, as_json: bool | None) -> None:
    try:
        said = str(parse_prompts(PIPE, text, as_json=as_json)[0].origin)
    except FinetuneError as error:
        said = str(error)
    assert "standard input" in said

"""Shapes of rows, and rows of every shape to the same messages."""

import json

import pytest

from finetune.core.errors import DataError, UsageError
from finetune.data.conversations import RowError
from finetune.data.formats import LabelError, detect_shape, parse_label, to_example
from finetune.data.readers import RawRow
from finetune.data.rows import Example, Message, Origin

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def example_of(value, columns=None) -> Example:
    row = RawRow(Origin("f", 1), value)
    return to_example(row, detect_shape([row], columns or {}).name, columns or {})


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


ASKED = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
        {"question": "Hi", "answer": "Hello"},
        {"input": "Hi", "output": "Hello"},
    ],
    ids=["messages", "role", "from", "json", "parts", "alpaca", "prompt", "prompt messages", "question", "input"],
)
def test_every_shape_becomes_the_same_conversation(value):
    assert turns(example_of(value)) == ASKED


def test_alpaca_keeps_history_system_and_the_fields_for_its_template():
    example = example_of(
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["Hi", "Hello"]]}
    )

    assert turns(example) == [("system", "Be brief"), *ASKED, ("user", "Add\n1 2"), ("assistant", "3")]
    assert example.fields == {"instruction": "Add", "input": "1 2"}


def test_a_column_map_gives_known_names_and_hides_what_it_replaces():
    row = {"text": "Where is my card?", "category": "card_arrival", "answer": "other"}

    assert turns(example_of(row, {"prompt": "text", "completion": "category"})) == [
        ("user", "Where is my card?"),
        ("assistant", "card_arrival"),
    ]


def test_numbers_are_text_and_null_is_empty():
    assert turns(example_of({"question": "6 x 7?", "answer": 42, "system": None})) == [
        ("user", "6 x 7?"),
        ("assistant", "42"),
    ]


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}], ids=["string", "object"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]])])
def test_tool_calls_are_normalised_and_null_content_is_empty(arguments, tools):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    example = example_of(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "3", "name": "look", "tool_call_id": "x"},
            ],
            "tools": tools,
        }
    )

    assert example.messages[1] == Message("assistant", "", (CALL,))
    assert example.messages[2] == Message("tool", "3", name="look", tool_call_id="x")
    assert example.tools == (TOOL,)


def test_sharegpt_function_calls_and_observations_become_tool_turns():
    call = json.dumps({"name": "look", "arguments": {"city": "Oslo"}})
    example = example_of(
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": call},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "3 degrees"},
            ]
        }
    )

    assert [message.role for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1].tool_calls == (CALL,)


def test_reasoning_and_calls_among_the_parts_are_kept():
    example = example_of(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "Look it up."},
                        {"type": "tool_call", "value": json.dumps(CALL["function"])},
                    ],
                },
            ]
        }
    )

    assert example.messages[1] == Message("assistant", "<think>\nLook it up.\n</think>\n\n", (CALL,))


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (1, True), ("true", True), ("Desirable", True), (1.0, True), ("1", True),
     (False, False), (0, False), ("FALSE", False), ("undesirable", False), (None, None), ("", None)],
)  # fmt: skip
def test_labels_are_understood_in_their_usual_spellings(label, expected):
    assert parse_label(label) is expected


@pytest.mark.parametrize("label", ["maybe", 2, -1, "yes", 0.5])
def test_any_other_label_is_an_error(label):
    with pytest.raises(LabelError, match="is none of true"):
        parse_label(label)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "Hi", "completion": ""}, "no answer"),
        ({"prompt": "Hi", "completion": None}, "no answer"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "no request"),
        ({"prompt": " ", "completion": "x"}, "request is empty"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "role 'wizard'"),
        ({"messages": ["Hi"]}, "message 1 is not an object"),
        ({"messages": []}, "conversation is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 is a number, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "only text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]}, "has no name"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]}, "valid JSON"),
        ({"prompt": "a", "completion": "b", "tools": "[{"}, "tools is not valid JSON"),
        ({"prompt": "a", "completion": "b", "tools": ["x"]}, "not a list of objects"),
        ({"prompt": "a", "completion": {"x": 1}}, "completion is an object, not text"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history is not a list"),
        ({"text": "  "}, "text is empty"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(value, reason):
    with pytest.raises(RowError, match=reason):
        example_of(value)


def test_a_row_of_another_shape_than_the_others_is_bad():
    rows = [RawRow(Origin("f", 1), {"prompt": "a", "completion": "b"}), RawRow(Origin("f", 2), "just text")]
    shape = detect_shape([rows[0], rows[0], rows[1]], {})

    with pytest.raises(RowError, match="the row is text"):
        to_example(rows[1], shape.name, {})


def test_unused_columns_are_counted():
    row = RawRow(Origin("f", 1), {"prompt": "a", "completion": "b", "id": 7, "label": True})

    assert detect_shape([row, row], {}).unused_columns == {"id": 2}


def test_preference_pairs_are_recognised_and_refused_with_the_way_to_use_them():
    row = RawRow(Origin("pairs.jsonl", 1), {"prompt": "a", "chosen": "b", "rejected": "c"})

    with pytest.raises(DataError, match=r"pairs\.jsonl: the rows are preference pairs.*completion: chosen"):
        detect_shape([row], {})
    assert turns(example_of(row.value, {"completion": "chosen", "prompt": "prompt"})) == [
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_unknown_columns_are_listed_with_the_known_shapes():
    with pytest.raises(DataError, match=r"Their columns: id, ground_truth\. Known shapes: messages"):
        detect_shape([RawRow(Origin("f", 1), {"id": 1, "ground_truth": []})], {})


def test_a_wrong_column_map_is_refused_with_what_there_is():
    rows = [RawRow(Origin("f.csv", 1), {"text": "a", "category": "b"})]

    with pytest.raises(UsageError, match=r"promt is no known field\. Did you mean prompt"):
        detect_shape(rows, {"promt": "text"})
    with pytest.raises(DataError, match=r"names kategory, which no row has\. The columns are: category, text"):
        detect_shape(rows, {"completion": "kategory"})

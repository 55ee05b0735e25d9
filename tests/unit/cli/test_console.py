"""What all commands share."""

import json

import pytest

from finetune.cli.console import count, option_help, print_json, print_table, quiet_output, size


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "rows": ({1: float("inf")}, "é")})

    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [{"1": None}, "é"]}


def test_what_libraries_print_under_json_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_output(True):
        print("loading")
    with quiet_output(False):
        print("shown")

    assert capsys.readouterr() == ("shown\n", "loading\n")


def test_columns_are_aligned_and_an_empty_table_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("long", "x"), ("y", "")])
    print_table(("", ""), [])

    assert capsys.readouterr().out == "a     b\nlong  x\ny\n"


@pytest.mark.parametrize(("number", "said"), [(None, "-"), (999, "999"), (260_032, "260K"), (7_240_000_000, "7.24B")])
def test_parameters_are_said_as_people_say_them(number: int | None, said: str) -> None:
    assert count(number) == said


@pytest.mark.parametrize(
    ("number", "said"), [(None, "-"), (12, "12 bytes"), (1_040_128, "1.04 MB"), (16.1e9, "16.1 GB")]
)
def test_sizes_are_said_as_people_say_them(number: float | None, said: str) -> None:
    assert size(number) == said


def test_help_of_an_option_is_the_schemas() -> None:
    assert option_help("training.learning_rate") == "Peak learning rate  (training.learning_rate)"

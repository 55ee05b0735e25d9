"""Errors become one message and an exit code; with --json, one document."""

import json
import sys

import pytest
from typer.core import TyperGroup

from finetune import __main__, __version__
from finetune.cli import main
from finetune.core.errors import DataError, StoppedBySignal, UsageError

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`ft doctor` raises what the test puts into the list."""
    errors: list[BaseException] = []

    def doctor(**_: object) -> None:
        raise errors[0]

    monkeypatch.setattr("finetune.workflows.doctor.examine", doctor)
    return errors


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("the file is empty"), 1, "the file is empty\n"),
        (UsageError("no such option"), 2, "no such option\n"),
        (StoppedBySignal("stopped at step 3", 15), 143, "stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (EOFError(), 1, "\nThe input ended, so nothing more was done.\n"),
    ],
)
def test_an_error_is_a_message_and_its_exit_code(
    raising: list[BaseException], capsys: Captured, error: BaseException, code: int, said: str
) -> None:
    raising.append(error)

    assert main.run(["doctor"]) == code
    assert capsys.readouterr() == ("", said)


def test_with_json_an_error_is_one_document_too(raising: list[BaseException], capsys: Captured) -> None:
    raising.append(DataError("the file is empty"))

    assert main.run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": {"type": "DataError", "message": "the file is empty", "exit_code": 1}
    }


def test_an_unforeseen_error_says_how_to_report_it(
    raising: list[BaseException], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising.append(ZeroDivisionError("division by zero"))

    assert main.run(["doctor"]) == 1
    short = capsys.readouterr().err
    monkeypatch.setenv("FT_DEBUG", "1")
    main.run(["doctor"])

    assert "ZeroDivisionError: division by zero" in short
    assert "FT_DEBUG=1" in short
    assert "Traceback" not in short
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["modles"], "No such command 'modles'. Did you mean 'models'?\nSee: ft --help"),
        (["models", "info"], "See: ft models info --help"),
        (["train", "validate", "--nonsense"], "No such option: --nonsense\nSee: ft train validate --help"),
        (["models", "--nonsense"], "No such option: --nonsense"),
        (["train", "start", "demo", "x", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["demo", "--backend", "cuda"], "Invalid value for '--backend': 'cuda' is not one of 'auto', 'mlx'"),
    ],
)
def test_a_wrong_command_line_leaves_with_2(arguments: list[str], said: str, capsys: Captured) -> None:
    assert main.run(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_group_without_a_command_shows_its_help(capsys: Captured) -> None:
    assert main.run(["models"]) == 2
    assert "ft models list" in capsys.readouterr().err


def test_ft_alone_shows_the_help(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as leaving:
        main.main([])

    assert leaving.value.code == 0
    assert "Usage: ft" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys: Captured) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"ft {__version__}\n"


def every_command() -> list[list[str]]:
    """All command lines that ft knows: `train`, `train start`, ..."""
    found: list[list[str]] = []
    for name in main.COMMANDS:
        command = main.load_command(name)
        found.append([name])
        if isinstance(command, TyperGroup):
            found.extend([name, member] for member in command.commands)
    return found


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_every_command_shows_an_example_that_begins_with_its_name(command: list[str], capsys: Captured) -> None:
    assert main.run([*command, "--help"]) == 0

    _, _, examples = capsys.readouterr().out.partition("Example")
    assert " ".join(["ft", *command]) in examples


def test_ctrl_c_while_the_libraries_are_read_is_answered_too(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    class Read:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "finetune.cli.main", Read())  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert (left.value.code, capsys.readouterr().err) == (130, "Stopped.\n")

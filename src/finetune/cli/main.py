"""`ft`: the table of commands, and the one place where errors become messages and exit codes.

A command's module is imported when the command is used, so `ft --help` costs nothing but the table below.
Convention: `finetune.cli.NAME` offers `app` (a group of commands) or a function called NAME (a single one).
"""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from finetune import __version__
from finetune.cli.console import JSON, note, print_json
from finetune.cli.reading import reading_shown
from finetune.core.errors import FinetuneError
from finetune.core.lasting_thread import leave_process

INTERRUPTED = 130

# name: one line for `ft --help`, in the order in which a person meets them.
COMMANDS: Mapping[str, str] = {
    "demo": "See it work: tune the carried model, before and after, in a few minutes.",
    "train": "Tune a model on a file of examples, resume a run, check a configuration.",
    "evaluate": "Measure base and tuned model on held-out rows, side by side.",
    "harness": "Run EleutherAI's lm-evaluation-harness on a tuned model.",
    "generate": "Answer prompts with a model, with or without an adapter.",
    "chat": "Talk to a model on the terminal.",
    "serve": "Serve a model and its adapters to OpenAI's clients.",
    "export": "Write a tuned model for PEFT, mlx-lm, llama.cpp, Ollama, or as one merged model.",
    "dataset": "Look at a file of examples: what is in it, what the model sees, what is wrong.",
    "models": "List the models on this machine, and say what is in one.",
    "doctor": "Check this machine: engines, libraries, memory, what to install.",
}


def load_command(name: str) -> Any:
    """Import a command's module and make its click command."""
    module = importlib.import_module(f"finetune.cli.{name}")
    app = module.__dict__.get("app")
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(module.__dict__[name])
    command = typer.main.get_command(app)
    command.name = name
    return command


class LazyGroup(TyperGroup):
    """Knows all commands by name and summary; imports the one that is run."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name=name, help=summary) for name, summary in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name else command, rest


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Tune language models on the machine you own, and check what came out.

    \b
    Examples:
      ft train quick demo examples.jsonl           a first look, in a minute or two
      ft train start demo examples.jsonl           the whole job
      ft train validate config/train.yml           check everything before you start
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `ft` and leave the process with 0, 1 (failed), 2 (wrong usage) or 128 + signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # names of files and texts of rows may hold what UTF-8 cannot say
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    leave_process(run(given or ["--help"]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error becomes a message."""
    try:
        with reading_shown():
            code = int(app(list(arguments), prog_name="ft", standalone_mode=False) or 0)
    except FinetuneError as error:
        return _report(arguments, error, str(error), error.exit_code)
    except typer.TyperException as error:
        return _report(arguments, error, _usage(error), error.exit_code)
    except typer.Abort as error:
        return _report(arguments, error, "The input ended, so nothing more was done.", 1)
    except OSError as error:
        return _report(arguments, error, _disk_said(error), 1) if error.filename else _report_fault(arguments, error)
    except Exception as error:
        return _report_fault(arguments, error)
    # typer turns Ctrl-C into this code and says nothing.
    return _report(arguments, KeyboardInterrupt(), "Stopped.", code) if code == INTERRUPTED else code


def _report(arguments: Sequence[str], error: BaseException, message: str, exit_code: int) -> int:
    """Say it on standard error, and with `--json` as the one document on standard output too."""
    if os.environ.get("FT_DEBUG"):
        traceback.print_exception(error)
    note(message)
    if JSON in arguments:
        print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": exit_code}})
    return exit_code


def _usage(error: typer.TyperException) -> str:
    """A wrong command line: what is wrong, and where the right one is described."""
    message = error.format_message()
    if message.startswith("Usage:"):
        return message  # a group without a command: its help says it all
    context = getattr(error, "ctx", None)  # of the command that was being read
    message = message.replace("Value error, ", "")  # typer's own prefix to what a value should be
    return f"{message}\nSee: {context.command_path if context else 'ft'} --help"


def _disk_said(error: OSError) -> str:
    """What the system refuses about a path that somebody gave: a name too long, a loop of links, a disk that fails."""
    return f"{error.filename}: {error.strerror}. Give another path, or mend what is there."


def _report_fault(arguments: Sequence[str], error: Exception) -> int:
    """An error that nobody foresaw is a fault of finetune, and the person should not have to read a traceback."""
    message = (
        f"ft failed in a way that it does not know: {type(error).__name__}: {error}\n"
        "This is a fault in finetune. Run the same command again with FT_DEBUG=1 before it, and report what it prints."
    )
    return _report(arguments, error, message, 1)

"""`ft chat`: talk to a model on the terminal, or through a pipe."""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import note
from finetune.core.errors import FinetuneError, UsageError

if TYPE_CHECKING:
    from finetune.workflows.chat import Conversation

COMMANDS = """\
/reset               forget the conversation
/system TEXT         change the system message; without TEXT: remove it
/adapter NAME|base   answer with an adapter, or with the base alone; without a name: list them
/compare TEXT        answers of the base and of every adapter to the same message
/help                this list
/exit                leave (also Ctrl-D); Ctrl-C stops an answer"""
BASE = "base"  # the model without an adapter, where answers are marked
BASE_NAMES = (BASE, "none")  # and what a person may call it

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", "-a", metavar="[NAME=]PATH", help="An adapter's directory, or a run; may be repeated, to switch."
    ),
]


def chat(
    *,
    run: Annotated[Path | None, typer.Argument(help="A run's directory: its model, adapter and template.")] = None,
    model: answers.Model = None,
    adapter: Adapters = None,
    checkpoint: answers.Checkpoint = None,
    backend: answers.Backend = None,
    device: answers.Device = None,
    max_tokens: answers.MaxTokens = 256,
    temperature: answers.Temperature = 0.0,
    top_p: answers.TopP = 1.0,
    top_k: answers.TopK = 0,
    min_p: answers.MinP = 0.0,
    repetition_penalty: answers.Penalty = 1.0,
    stop: answers.Stop = None,
    seed: answers.Seed = 0,
    template: answers.Template = None,
    system: answers.System = None,
) -> None:
    """Talk to a model. Lines that begin with / are commands: /help lists them.

    Works on a terminal and with piped input; answers go to standard output, everything else to standard error.

    \b
    Examples:
      ft chat outputs/mine
      ft chat --model MODEL --adapter old=outputs/first --adapter new=outputs/second
      echo "Wake me at seven" | ft chat --model demo
    """
    from finetune.workflows import chat as workflow

    options = answers.answer_options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    opened = workflow.chat(
        run,
        model=model,
        adapters=_named(adapter or []),
        checkpoint=checkpoint,
        backend=backend,
        device=device,
        options=options,
        template=template,
        system=system,
        on_notice=note,
    )
    with opened as conversation:
        note("Ctrl-D or /exit to leave, /help for commands.")
        with suppress(KeyboardInterrupt):  # Ctrl-C while waiting for a line leaves, as Ctrl-D does
            for line in _lines():
                if line.strip() == "/exit":
                    break
                _turn(conversation, line)


def _lines() -> Iterator[str]:
    """Lines of the person, with editing on a terminal; empty ones are left out."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() history and line editing
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        if line.strip():
            yield line


def _turn(conversation: "Conversation", line: str) -> None:
    """One command or one message; what is wrong with it is said, and the conversation goes on."""
    try:
        if line.startswith("/"):
            _command(conversation, line)
        else:
            _answer(conversation, line)
    except FinetuneError as error:
        note(str(error))


def _command(conversation: "Conversation", line: str) -> None:
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.history.reset()
        note("The conversation is forgotten.")
    elif name == "/system":
        conversation.history.set_system(rest or None)
        note("The system message is changed." if rest else "There is no system message now.")
    elif name == "/adapter":
        note(_switched(conversation, rest))
    elif name == "/compare":
        _compare(conversation, rest)
    elif name == "/help":
        note(COMMANDS)
    else:
        note(f"{name} is no command. /help lists them; a message cannot begin with /.")


def _switched(conversation: "Conversation", name: str) -> str:
    """Switch to an adapter or to the base; without a name, what there is."""
    if name:
        conversation.switch_adapter(None if name in BASE_NAMES else name)
    active = f"{conversation.adapter} answers" if conversation.adapter else "The base answers, without an adapter"
    return f"{active}. Adapters: {', '.join(conversation.adapters) or 'none'}."


def _compare(conversation: "Conversation", text: str) -> None:
    if not text:
        raise UsageError("/compare needs a message: /compare TEXT.")
    answers = conversation.compare(text)
    width = max(len(name or BASE) for name in answers)
    for name, answer in answers.items():
        typer.echo(f"{f'{name or BASE}:':<{width + 1}} {answer.text}")


def _named(given: list[str]) -> dict[str, Path]:
    """Adapters by name: NAME=PATH, or a path that gives the name. Raises UsageError for a name that comes twice."""
    from finetune.workflows.chat import name_of

    named: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        whole = Path(text)
        if not equals or whole.exists():
            name, path = name_of(whole), text
        if name in {*named, *BASE_NAMES} or not name or not path:
            raise UsageError(f"--adapter {text}: {name!r} is taken or no name. Give another one, as in NAME=PATH.")
        named[name] = Path(path)
    return named


def _answer(conversation: "Conversation", line: str) -> None:
    with closing(conversation.ask(line)) as pieces:
        try:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            note("\nStopped.")
    typer.echo()

"""`ft serve`: a model behind an OpenAI-compatible API."""

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli import answers
from finetune.cli.console import note
from finetune.core.errors import UsageError
from finetune.serving.settings import ServerSettings

DEFAULTS = ServerSettings()

Served = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's directory, a model's, a cached model, or `demo`.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="NAME=PATH", help="Serve this adapter or run too; may be repeated."),
]
Name = Annotated[str | None, typer.Option("--name", help="What clients call RUN or MODEL; default: its directory.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all of this machine's.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="A key that clients must send. Others on this machine can see it.",
    ),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="A file with one key a line. FT_API_KEY may hold a key too.")
]
Origins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", metavar="ORIGIN", help="Web pages of this origin may call the server."),
]
AllowLoading = Annotated[
    bool, typer.Option("--allow-adapter-loading", help="Clients may load and unload adapters of --adapter-root.")
]
AdapterRoot = Annotated[
    Path | None, typer.Option("--adapter-root", help="The directory that clients may load adapters from.")
]
MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, max=1024, help="Answers that decode together.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", min=0, max=100_000, help="Answers that may wait; then 429.")]
MaxBody = Annotated[int, typer.Option("--max-body", min=1_000, help="Largest body of a request, in bytes.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of one answer.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds from a request to the end of its answer.")]
Grace = Annotated[float, typer.Option("--grace", min=0.0, help="Seconds for answers under way when told to stop.")]


def serve(
    *,
    model: Served,
    adapter: Adapters = None,
    name: Name = None,
    checkpoint: answers.Checkpoint = None,
    backend: answers.Backend = None,
    device: answers.Device = None,
    template: answers.Template = None,
    host: Host = DEFAULTS.host,
    port: Port = DEFAULTS.port,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allow_origin: Origins = None,
    allow_adapter_loading: AllowLoading = False,
    adapter_root: AdapterRoot = None,
    max_batch: MaxBatch = DEFAULTS.max_batch,
    max_queue: MaxQueue = DEFAULTS.max_queue,
    max_body: MaxBody = DEFAULTS.max_body,
    max_tokens: MaxTokens = DEFAULTS.max_tokens,
    timeout: Timeout = DEFAULTS.timeout,
    grace: Grace = DEFAULTS.grace,
) -> None:
    """Serve a model and its adapters to OpenAI's clients: one base in memory, adapters chosen by model name.

    Listens on this machine only, unless --host says otherwise. Stops with Ctrl-C or SIGTERM, once the answers under
    way have ended or --grace is over. Needs finetune[serve].

    \b
    Examples:
      ft serve outputs/mine
      ft serve demo --adapter tools=outputs/tools --adapter style=outputs/style/adapter
      FT_API_KEY=... ft serve outputs/mine --host 0.0.0.0 --port 8080
      ft serve MODEL --allow-adapter-loading --adapter-root outputs
    """
    from finetune.workflows import serve as workflow

    settings = ServerSettings(host=host, port=port, timeout=timeout, grace=grace)
    settings = replace(settings, max_batch=max_batch, max_queue=max_queue, max_body=max_body, max_tokens=max_tokens)
    keys, root = gathered_keys(api_key or [], api_key_file), root_of_loading(allow_adapter_loading, adapter_root)
    log_to_standard_error()
    workflow.serve(
        model,
        adapters=named_paths(adapter or []),
        name=name,
        checkpoint=checkpoint,
        backend=backend,
        device=device,
        template=template,
        settings=replace(settings, api_keys=keys, adapter_root=root, allowed_origins=tuple(allow_origin or ())),
        on_notice=note,
    )


def gathered_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys, wherever they come from. Raises UsageError for files without one, and for keys that no header takes."""
    keys = [*given, *([os.environ["FT_API_KEY"]] if "FT_API_KEY" in os.environ else [])]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {file} cannot be read: {error}.") from error
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise UsageError(f"--api-key-file {file} holds no key. Write one on each line.")
        keys += in_file
    if any(not key.isascii() or not key.isprintable() or not key.strip() or " " in key for key in keys):
        raise UsageError("An API key is empty, or has spaces or letters beyond ASCII, which no header can carry.")
    return tuple(dict.fromkeys(keys))


def root_of_loading(allowed: bool, root: Path | None) -> Path | None:
    """The directory for loading, where it is allowed. Raises UsageError where one of the two options is missing."""
    if allowed != (root is not None):
        raise UsageError("--allow-adapter-loading and --adapter-root DIR belong together. Give both, or neither.")
    if root is not None and not root.is_dir():
        raise UsageError(f"--adapter-root {root} is not a directory.")
    return root


def named_paths(given: list[str]) -> dict[str, Path]:
    """NAME=PATH pairs. Raises UsageError for anything else, and for a name that comes twice."""
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (name, _, path) in zip(given, pairs, strict=True) if not name or not path]
    if wrong:
        raise UsageError(f"--adapter {wrong[0]}: give a name and a path, as in --adapter tools=outputs/tools.")
    names = [name for name, _, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--adapter: two adapters are called {twice!r}. Give each a name of its own.")
    return {name: Path(path) for name, _, path in pairs}


def log_to_standard_error() -> None:
    """A line for each request, and what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("finetune.serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

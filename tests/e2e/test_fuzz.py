"""Bad files, configurations and command lines by the thousand: always an exit code, and a message with a name in it.

`FT_TEST_FUZZ=2500 pytest tests/e2e/test_fuzz.py` tries that many; the default is a sample of them.
"""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.bad_bytes import ODD_SCALARS, ODD_YAML, damaged, odd_files
from tests.support.ft import Ran
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model
from tests.support.tiny_run import write_rows

from finetune.cli.main import COMMANDS, load_command, run
from finetune.config.schema import RunConfig

TRIED = int(os.environ.get("FT_TEST_FUZZ", "400"))
SECONDS = 60
BASE = """model:
  name: model
  backend: mlx
lora:
  rank: 4
training:
  max_steps: 1
data:
  train_file: rows.jsonl
output:
  sample_prompts: 0
"""
OPTIONS = [
    f"{section}.{key}" for section, field in RunConfig.model_fields.items() for key in field.annotation.model_fields
]


def share(part: float) -> Any:
    """This part of all that is tried, the same each time."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=max(5, int(TRIED * part)),
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with a model, an adapter, rows, and things that are no files."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_tiny_model(folder / "model")
    write_tiny_adapter(folder / "adapter", base=str(folder / "model"))
    write_rows(folder / "rows.jsonl")
    (folder / "good.yml").write_text(BASE)
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nowhere").symlink_to(folder / "missing")
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "latin-\udce4.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


class Hangs(BaseException):
    """A command did not come back."""


def _hangs(number: int, frame: FrameType | None) -> None:
    raise Hangs


def ft(*arguments: str) -> Ran:
    """Run a command in this process, with outputs as `main` makes them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in range(2))
    former = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            patch.object(sys, "stdin", io.StringIO("")),
        ):
            code = run(list(arguments))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    said = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # type: ignore[attr-defined]
    return Ran(code, *said)


def require_answer(ran: Ran, *named: str) -> None:
    """An exit code, and where it is not 0, a message that has one of the names in it."""
    assert ran.code in {0, 1, 2}, ran
    assert "Traceback" not in ran.err, ran.err
    assert "fault in finetune" not in ran.err, ran.err
    assert not Path("trap.txt").exists()
    if ran.code:
        assert any(name in ran.err for name in named), ran.err


def clean(folder: Path) -> None:
    for name in ("run", "out", "outputs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in folder.glob("out*"):
        file.unlink()


DATA_COMMANDS = (
    ("dataset", "info", "{}"),
    ("dataset", "info", "{}", "--model", "model"),
    ("dataset", "inspect", "{}", "--model", "model", "--rows", "9"),
    ("dataset", "check", "{}", "--model", "model"),
    ("dataset", "check", "rows.jsonl", "--validation", "{}"),
    ("dataset", "prepare", "{}", "--output", "out.jsonl", "--split", "0.3"),
    ("train", "validate", "good.yml", "--set", "data.train_file={}", "--set", "data.max_error_rate=0.5"),
    ("train", "validate", "good.yml", "--set", "data.validation_file={}"),
    ("evaluate", "--model", "model", "--data", "{}", "--limit", "2", "--generate", "0"),
)


@given(file=odd_files(), command=st.sampled_from(DATA_COMMANDS))
@share(0.5)
def test_files_of_examples(folder: Path, file: tuple[str, bytes], command: tuple[str, ...]) -> None:
    name, content = file
    clean(folder)
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / name).write_bytes(content)
    ran = ft(*(part.replace("{}", f"bad/{name}") for part in command))
    (folder / "bad" / name).unlink()

    require_answer(ran, name, "data.")


@st.composite
def odd_yaml(draw: st.DrawFn) -> str:
    lines = BASE.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                lines[at] = draw(st.sampled_from(ODD_YAML))
            case 1:
                lines.insert(at, draw(st.sampled_from(ODD_YAML)))
            case 2:
                section, _, key = draw(st.sampled_from(OPTIONS)).partition(".")
                lines += [f"{section}:", f"  {key}: {draw(st.sampled_from(ODD_SCALARS))}"]
            case _:
                lines[at] = f"{lines[at].partition(':')[0]}: {draw(st.sampled_from(ODD_SCALARS))}"
    return "\n".join(lines)


@given(text=odd_yaml(), data=st.data())
@share(0.2)
def test_configurations(folder: Path, text: str, data: st.DataObject) -> None:
    content = text.encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 4)) == 0:
        content = data.draw(damaged(content))
    (folder / "bad.yml").write_bytes(content)

    words = [word for word in re.findall(r"[^\s:]+", text) if len(word) > 2]
    require_answer(ft("train", "validate", "bad.yml"), "bad.yml", *OPTIONS, *words)


@given(
    key=st.sampled_from(OPTIONS)
    | st.sampled_from(["", ".", "x", "model", "model.", ".name", "model.nam", "\ud800", "a.b.c"]),
    value=st.sampled_from(ODD_SCALARS) | st.text(max_size=12),
    place=st.sampled_from(["--set", "environment"]),
)
@share(0.15)
def test_overrides_and_the_environment(folder: Path, key: str, value: str, place: str) -> None:
    section, _, name = key.partition(".")
    variable = f"FT_{section}__{name}".upper()
    clean(folder)
    if place == "--set":
        ran = ft("train", "validate", "good.yml", "--set", f"{key}={value}")
    else:
        with patch.dict(os.environ, {variable: value.replace("\x00", "")} if key.isascii() else {}):
            ran = ft("train", "validate", "good.yml")

    named = [key or "--set", value.strip("'\" ") or ". "]  # an empty name means this directory
    require_answer(ran, "--set", variable, *named, *OPTIONS, "a file without a name")


ODD_WORDS = (
    *("", " ", "-", "--", "--nothing", "-9", "0", "99999999999999999999", "1e999", "nan", "x" * 300, "x" * 5_000),
    *("..", "/", "/dev/null", "/dev/full", "/proc/self/mem", "empty", "loop", "nowhere", "fifo.jsonl", "missing/deep"),
    *("rows.jsonl", "good.yml", "model", "model/config.json", "adapter", "demo", "some-org/tiny", "hf://datasets/a/b"),
    *("latin-\udce4.jsonl", "\udcff\udcfe", "a\nb", "\x1b[31m", "{{ x }}", "%s", "~", "~nobody", "*", "$(true)", "'"),
    *("rows.jsonl/x", "model/model.safetensors", "rows.jsonl.gz", "a\x00b", "9" * 5_000, "-1", "0.5", "true"),
)
# What goes on until somebody stops it, downloads, or trains for minutes.
LEFT_OUT = {"demo", "serve", "chat", "doctor"}


def _commands() -> list[tuple[tuple[str, ...], list[str]]]:
    """Every command with its option names."""
    found = []
    for name in sorted(COMMANDS.keys() - LEFT_OUT):
        command = load_command(name)
        subcommands = getattr(command, "commands", {})
        parts = {(name, sub): inner for sub, inner in subcommands.items()} or {(name,): command}
        found += [
            (path, [o for p in inner.params for o in p.opts if o.startswith("-")]) for path, inner in parts.items()
        ]
    return found


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    path, options = draw(st.sampled_from(_commands()))
    words = draw(st.lists(st.sampled_from(ODD_WORDS), max_size=3))
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        words.append(option)
        if draw(st.integers(0, 3)):
            words.append(draw(st.sampled_from(ODD_WORDS) | st.text(max_size=8)))
    limits = ["--max-steps", "1"] if path[0] == "train" and path[-1] in {"start", "quick"} else []
    return [*path, *words, *limits]


@given(words=command_lines().filter(lambda words: "--self-test" not in words))
@share(0.15)
def test_command_lines(folder: Path, words: list[str]) -> None:
    clean(folder)
    ran = ft(*words)

    said = [word.encode("utf-8", "backslashreplace").decode() for word in words if len(word) > 1]
    said += [Path(word).name for word in said if not word.endswith("/")]
    found = (
        "is not a model directory",
        "name of a model",
        "without a name",
        "Configuration .",
        ": there is no such file",
    )
    require_answer(ran, *said, "Missing", "--help", "--", "outputs", "input", *found)

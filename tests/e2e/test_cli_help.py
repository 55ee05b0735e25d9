"""`ft --help` is fast and light, completion works, and errors are for people and for machines."""

import os
import subprocess
import sys

import pytest

HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "numpy", "pydantic", "huggingface_hub", "matplotlib", "rich")


def ft(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        begin = processor_seconds()
        assert ft("--help").returncode == 0
        return processor_seconds() - begin

    def processor_seconds() -> float:
        used = os.times()
        return used.children_user + used.children_system

    # It takes 0.1 s; of the processor, as a loaded machine gives it late, and the best of several, as it slows it too.
    assert min(seconds() for _ in range(5)) < 0.4


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom finetune.cli.main import run\n"
        f"assert run({arguments!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("typed", "position", "offered"), [("ft tr", 1, {"train"}), ("ft train s", 2, {"start", "schema"})]
)
def test_completion_knows_commands_and_what_is_in_them(
    monkeypatch: pytest.MonkeyPatch, typed: str, position: int, offered: set[str]
) -> None:
    monkeypatch.setenv("_FT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(position))

    assert set(ft().stdout.split()) == offered


def test_json_errors_are_one_document_and_no_traceback() -> None:
    done = ft("models", "info", "no-such-model", "--json")

    assert done.returncode == 1
    assert done.stdout.startswith("{")
    assert "Traceback" not in done.stderr


# mlx-lm imports transformers, which imports PyTorch wherever it is installed: so the engine's package is looked for.
@pytest.mark.parametrize(("backend", "other"), [("mlx", "finetune.engines.torch"), ("pytorch", "mlx")])
def test_a_command_on_one_engine_never_imports_the_other(backend: str, other: str) -> None:
    arguments = ["generate", "--model", "demo", "--prompt", "Hello", "--max-tokens", "2", "--backend", backend]
    code = (
        "import sys\nfrom finetune.cli.main import run\n"
        f"assert run({arguments!r}) == 0\nprint({other!r} in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert done.stderr.splitlines()[-1] == "False", done.stderr

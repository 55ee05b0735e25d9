"""The commands of docs/export.md, run as they are on a small run."""

import re
import shlex
from pathlib import Path

import pytest
from tests.conftest import REPOSITORY
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_run

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp is needed for K-quants")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ft ")]


def test_the_commands_of_the_guide_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(tmp_path / "outputs", write_tiny_model(tmp_path / "base"))
    run.rename(tmp_path / "outputs" / "mine")
    found = commands()
    assert len(found) >= 8
    for command in found:
        ran = ft(*command)
        assert ran.code == 0, (command, ran.err)
        assert Path(command[command.index("--output") + 1]).exists()

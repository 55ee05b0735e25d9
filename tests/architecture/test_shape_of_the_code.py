"""Sizes that keep the code readable: no file above 400 lines, no function above 60."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "finetune"
FILES = sorted(SOURCE.rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTION)]
    long = {node.name: length for node in functions if (length := (node.end_lineno or 0) - node.lineno + 1) > 60}

    assert len(text.splitlines()) <= 400
    assert not long


LIBRARIES_OF = {"mlx": {"mlx", "mlx_lm"}, "torch": {"torch", "bitsandbytes"}}
REFERENCES = {"peft", "trl"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_an_engine_imports_its_library(path: Path) -> None:
    parts = path.relative_to(SOURCE).parts
    engine = parts[1] if parts[0] == "engines" else ""
    foreign = {library for name, libraries in LIBRARIES_OF.items() if name != engine for library in libraries}

    assert not imported_by(path) & (foreign | REFERENCES)


def imported_by(path: Path) -> set[str]:
    """Top-level packages that a file imports, at its head or in a function."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in plain + named}

"""Do a model's files fit its config.json? Every mismatch of names and shapes at once, in one wording."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from finetune.core.errors import ModelError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_REPORTED = 20  # mismatches spelt out; the rest is counted


def require_fit(path: Path, *, expected: Shapes, found: Shapes) -> None:
    """Raise ModelError unless the files in `path` hold exactly the expected tensors."""
    problems = [f"{name} {expected[name]} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} {found[name]} does not belong to the model" for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            problems.append(f"{name} has shape {found[name]}, and config.json needs {expected[name]}")
    if problems:
        raise ModelError(_report(path, problems))


def _report(path: Path, problems: list[str]) -> str:
    count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
    lines = [f"The weights in {path} do not fit its config.json; {count} not match:", *problems[:_REPORTED]]
    if len(problems) > _REPORTED:
        lines.append(f"... and {len(problems) - _REPORTED} more")
    return "\n  ".join(lines) + "\nCopy the model again, or correct config.json."

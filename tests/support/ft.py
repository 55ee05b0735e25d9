"""Runs `ft` as a person does: in another process."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and both outputs."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def ft(*arguments: object, stdin: str | None = None) -> Ran:
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)

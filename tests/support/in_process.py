"""Runs `ft` in this process: the same entry point without the start of an interpreter for each command."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from tests.support.ft import Ran

from finetune.cli.main import run


def ft_here(*arguments: object, stdin: str = "") -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", io.StringIO(stdin)):
        code = run([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())

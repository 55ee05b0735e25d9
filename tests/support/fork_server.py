"""Runs `ft` commands in forked processes, so that each starts in milliseconds instead of seconds.

The parent imports what a command needs and never uses it; each child is a process of its own, which takes signals
and dies like any other. Reads one JSON list of arguments a line; answers {"pid": n}, then {"code": exit status}.
"""

import importlib
import json
import os
import signal
import sys

MODULES = (
    "finetune.cli.train",
    "finetune.engines.mlx.engine",
    "finetune.engines.torch.engine",
    "finetune.workflows.train",
    "matplotlib.figure",
    "mlx_lm.models.llama",
    "transformers.models.llama.modeling_llama",
)


def serve() -> None:
    for module in MODULES:
        importlib.import_module(module)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def run(arguments: list[str]) -> None:
    from finetune.cli.main import run as ft

    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open("ft.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = ft(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()

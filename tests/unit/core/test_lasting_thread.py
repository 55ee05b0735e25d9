"""A process that has a thread of an engine ends with the status that it was asked for."""

import subprocess
import sys

import pytest

from finetune.core.lasting_thread import LastingThread

COMPUTING = """
import sys, threading
import mlx.core as mx
from finetune.core.lasting_thread import LastingThread, leave_process

started, compiled = threading.Event(), []

def compute():
    while True:
        functions = [mx.compile(lambda x, i=i: mx.exp(x) * i + 1) for i in range(30)]
        mx.eval([function(mx.ones(3)) for function in functions])
        started.set()

LastingThread(compute, "engine").start()
started.wait()
print("said")
leave_process(7)
"""


def test_the_thread_is_still_there_when_its_work_is_over() -> None:
    done: list[int] = []
    thread = LastingThread(lambda: done.append(1), "engine")
    assert not thread.over.is_set()
    thread.start()
    assert thread.over.wait(timeout=60)
    thread.join(timeout=0.2)
    assert thread.is_alive()
    assert done == [1]


def test_a_process_whose_engine_still_computes_leaves_with_its_status() -> None:
    pytest.importorskip("mlx.core")
    ran = subprocess.run([sys.executable, "-c", COMPUTING], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "said\n", "")  # sys.exit aborts here

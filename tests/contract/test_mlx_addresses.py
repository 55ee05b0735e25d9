"""OpenBLAS under a limit of addresses: what it cannot have is said, in place of a product that never ends."""

import subprocess
import sys

import pytest

START = """
import resource
import psutil
from finetune.engines.mlx.device import use_device
import mlx.core as mx

def limit(mebibytes):
    most = psutil.Process().memory_info().vms + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

streams = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(2)]
matrix = mx.ones((512, 512))
mx.eval(matrix + 1, *[mx.add(matrix, 1, stream=stream) for stream in streams])
"""
REFUSED = """
limit(200)  # for one of two threads
use_device("cpu")
"""
RESERVED = """
limit(600)
use_device("cpu")
limit(40)
products = [mx.matmul(matrix, matrix, stream=stream) for stream in streams]
mx.eval(products)
print(*[product[0, 0].item() for product in products])
"""


def run(code, **environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def two_threads(monkeypatch) -> dict[str, str]:
    import os

    from finetune.engines.mlx.blas import load_openblas

    if load_openblas().library is None:
        pytest.skip("OpenBLAS is not installed")
    return {**os.environ, "OPENBLAS_NUM_THREADS": "2"}


def test_what_threads_need_is_taken_before_there_is_no_room_for_it(two_threads):
    done = run(RESERVED, **two_threads)

    assert done.stdout.split() == ["512.0", "512.0"], done.stderr


def test_too_few_addresses_are_an_error_that_says_what_to_do(two_threads):
    done = run(REFUSED, **two_threads)

    assert done.returncode == 1
    assert "OpenBLAS takes 129 MiB of addresses for each of 2 threads" in done.stderr
    assert "OPENBLAS_NUM_THREADS=1" in done.stderr

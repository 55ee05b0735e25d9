"""What a PyTorch step takes from the operating system, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEAK = """
import json, resource, sys
from pathlib import Path
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_training
from finetune.engines.torch.engine import TorchEngine

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

session = open_training(TorchEngine(), Path(sys.argv[1]), **json.loads(sys.argv[2]))
batch = batch_of(random_rows(36, vocabulary=272, lengths=(127, 128)))
before = most()
session.step([batch], learning_rate=1e-3).result()
print(most() - before)
"""


def peak_of_a_step(model: Path, **options: Any) -> int:
    command = [sys.executable, "-c", PEAK, str(model), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_recomputed_activations_go_back_to_the_system(wide: Path) -> None:
    """Their blocks would stay in glibc's heap, and half of what recomputation saves with them."""
    assert peak_of_a_step(wide, gradient_checkpointing=True) < 0.35 * peak_of_a_step(wide)


GROWTH = """
import os, sys
os.environ.update(dict(pair.split("=") for pair in sys.argv[1:]))
import finetune.engines.torch
import psutil, torch
from finetune.engines.torch.compat import fast_in_bfloat16

weight = torch.ones(128, 128, dtype=torch.bfloat16)
held = psutil.Process().memory_info().rss
for rows in range(2, 502):
    torch.nn.functional.linear(torch.ones(rows, 128, dtype=torch.bfloat16), weight)
print(psutil.Process().memory_info().rss - held if fast_in_bfloat16(torch.device("cpu")) else -1)
"""


def growth_over_shapes(*environment: str) -> int:
    command = [sys.executable, "-c", GROWTH, *environment]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if grown < 0:
        pytest.skip("this processor has no bfloat16 arithmetic, so nothing is compiled")
    return grown


def test_products_of_many_shapes_are_not_all_kept() -> None:
    """Rows have all lengths, and in bfloat16 each costs about half a megabyte."""
    all_kept = growth_over_shapes("ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024", "LRU_CACHE_CAPACITY=1024")
    assert growth_over_shapes() < 0.5 * all_kept

"""Plots where a process has few addresses left."""

import subprocess
import sys

import pytest

CODE = """
import resource
import matplotlib.figure
import psutil
from finetune.tracking import plots

plots.take_addresses()
most = psutil.Process().memory_info().vms + 24 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
figures = {"loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0, "memory_gb": 0.5}
print(len(plots.make_plots([{"event": "step", "step": step, **figures} for step in range(200)])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
def test_a_run_whose_addresses_are_limited_can_draw_what_it_did():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=120)

    assert done.stdout.strip() == "4", done.stderr

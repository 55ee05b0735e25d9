"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_quick_start_runs_and_lowers_the_loss(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quick_start.py")], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    base, tuned = (float(part.split()[2]) for part in done.stdout.splitlines()[-2].split(","))
    assert tuned < base

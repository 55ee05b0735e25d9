"""OpenBLAS is loaded before MLX where it is there, and everything works where it is not."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
{before}
from finetune.config.schema import ModelConfig
from finetune.engines.registry import choose_engine
info = choose_engine(ModelConfig(name="any", backend="mlx")).info()
import mlx.core as mx
product = (mx.ones((4, 3)) @ mx.ones((3, 2))).tolist()
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps([info.device, info.advice, product[0], "openblas" in maps.replace("scipy_openblas", "")]))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")


def run(before: str = "", **environ: str) -> tuple[str, list[str], bool]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    device, advice, product, loaded = json.loads(done.stdout)
    assert product == [3.0, 3.0]
    return device, advice, loaded


def test_what_is_said_is_what_is_loaded() -> None:
    device, advice, loaded = run(FT_OPENBLAS="on")
    assert ("OpenBLAS" in device) == loaded
    assert bool(advice) != loaded


def test_the_switch_keeps_it_out_and_the_advice_says_so() -> None:
    device, advice, loaded = run(FT_OPENBLAS="off")
    assert device == "cpu (reference BLAS)"
    assert "FT_OPENBLAS=off" in advice[0]
    assert not loaded


def test_a_machine_without_it_is_told_which_package_to_install() -> None:
    hide = "import ctypes\ndef absent(*a, **k): raise OSError('absent')\nctypes.CDLL = absent"
    device, advice, _ = run(before=hide, FT_OPENBLAS="on")
    assert device == "cpu (reference BLAS)"
    assert "libopenblas0-pthread" in advice[0]


def test_mlx_imported_too_early_is_noticed() -> None:
    device, advice, _ = run(before="import mlx.core", FT_OPENBLAS="on")
    assert device == "cpu (unknown)"
    assert "Import finetune first" in advice[0]

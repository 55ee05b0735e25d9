"""`ft evaluate` in another process."""

from pathlib import Path

import pytest
from tests.support.ft import ft
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_run


def test_a_run_is_measured_with_one_document_on_standard_output_by_either_engine(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "work", write_tiny_model(tmp_path / "model"))
    by_engine = {}
    for backend in ("mlx", "pytorch"):
        ran = ft("evaluate", run, "--generate", 2, "--backend", backend, "--json")
        assert ran.code == 0
        assert ran.json["tuned"]["loss"] < ran.json["base"]["loss"]
        by_engine[backend] = ran.json["tuned"]["loss"]
    # float32 sums in another order
    assert by_engine["mlx"] == pytest.approx(by_engine["pytorch"], rel=1e-5)


def test_a_directory_that_is_no_run_is_wrong_usage(tmp_path: Path) -> None:
    ran = ft("evaluate", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "is not a run" in ran.err

"""`ft evaluate`, in a process of its own and in this one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.ft import Ran, ft
from tests.support.in_process import ft_here
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_run


def test_a_run_is_measured_with_one_document_on_standard_output_by_either_engine(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "work", write_tiny_model(tmp_path / "model"))
    by_engine = {}
    started: dict[str, Callable[..., Ran]] = {"mlx": ft, "pytorch": ft_here}
    for backend, start in started.items():
        ran = start("evaluate", run, "--generate", 2, "--backend", backend, "--json")
        assert ran.code == 0
        assert ran.json["tuned"]["loss"] < ran.json["base"]["loss"]
        by_engine[backend] = ran.json["tuned"]["loss"]
    # float32 sums in another order
    assert by_engine["mlx"] == pytest.approx(by_engine["pytorch"], rel=1e-5)


def test_a_directory_that_is_no_run_is_wrong_usage(tmp_path: Path) -> None:
    ran = ft_here("evaluate", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "is not a run" in ran.err

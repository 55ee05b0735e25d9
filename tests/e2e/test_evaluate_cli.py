"""`ft evaluate` in another process."""

from pathlib import Path

from tests.support.ft import ft
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_run


def test_a_run_is_measured_with_one_document_on_standard_output(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "work", write_tiny_model(tmp_path / "model"))
    ran = ft("evaluate", run, "--generate", 2, "--json")
    assert ran.code == 0
    assert ran.json["tuned"]["loss"] < ran.json["base"]["loss"]


def test_a_directory_that_is_no_run_is_wrong_usage(tmp_path: Path) -> None:
    ran = ft("evaluate", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "is not a run" in ran.err

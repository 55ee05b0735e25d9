"""The directory of a run."""

import multiprocessing
from pathlib import Path

import pytest

from finetune.core.errors import CheckpointError, TrainingError, UsageError
from finetune.core.paths import RunPaths
from finetune.training.run_directory import check_new, create, held, locate


def fill(paths: RunPaths) -> None:
    paths.run_info.write_text("{}")
    paths.checkpoint(3).mkdir(parents=True)
    paths.best.symlink_to("checkpoints/step-000003")


def make_run(root: Path) -> RunPaths:
    return create(root, fill)


def test_a_new_directory_and_an_empty_one_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()

    for place in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert create(place, fill).run_info.read_text() == "{}"
        assert list(place.parent.glob(".*")) == []


def test_a_directory_appears_with_everything_in_it_or_not_at_all(tmp_path):
    def fill_in_the_dark(paths: RunPaths) -> None:
        fill(paths)
        assert not (tmp_path / "run").exists()

    assert create(tmp_path / "run", fill_in_the_dark).run_info.is_file()


@pytest.mark.parametrize("is_there", [True, False])
def test_what_cannot_be_written_is_taken_away(tmp_path, is_there):
    if is_there:
        (tmp_path / "run").mkdir()

    def fail(paths: RunPaths) -> None:
        fill(paths)
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        create(tmp_path / "run", fail)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "run"] if is_there else [])


def test_checking_creates_nothing(tmp_path):
    check_new(tmp_path / "new")

    assert not (tmp_path / "new").exists()


def test_a_directory_with_a_run_is_refused_with_how_to_go_on(tmp_path):
    make_run(tmp_path / "run")

    with pytest.raises(UsageError, match=r"holds a run already.*ft train --resume"):
        check_new(tmp_path / "run")


def test_a_directory_with_anything_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(UsageError, match="not empty"):
        create(tmp_path, fill)
    with pytest.raises(UsageError, match="is a file"):
        create(tmp_path / "thesis.txt", fill)
    with pytest.raises(UsageError, match="cannot be made"):
        create(tmp_path / "thesis.txt" / "run", fill)


def test_resume_takes_a_run_a_checkpoint_or_the_link_best(tmp_path):
    run = make_run(tmp_path / "run")

    assert locate(run.root) == (run, None)
    assert locate(run.checkpoint(3)) == (run, run.checkpoint(3))
    assert locate(run.best) == (run, run.checkpoint(3))


@pytest.mark.parametrize(("name", "words"), [("absent", "is not there"), ("other", "is neither a run")])
def test_anything_else_is_refused_with_what_to_give(tmp_path, name, words):
    (tmp_path / "other").mkdir()

    with pytest.raises(CheckpointError, match=rf"{words}.*Give --resume"):
        locate(tmp_path / name)


def _hold(root: Path, ready, release) -> None:
    with held(RunPaths(root)):
        ready.set()
        release.wait(20)


def test_only_one_process_trains_in_a_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    try:
        assert ready.wait(20)
        with pytest.raises(TrainingError, match="Another process is training"), held(RunPaths(tmp_path)):
            pass
    finally:
        release.set()
        process.join()
    with held(RunPaths(tmp_path)):
        assert list(tmp_path.iterdir()) == []

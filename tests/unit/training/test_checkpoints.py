"""Checkpoints: whole or absent, and never the wrong one deleted."""

import contextlib
import errno
import os
import random
from pathlib import Path

import pytest
from tests.support.fake_engine import FakeSession

from finetune.core.errors import CheckpointError, TrainingError
from finetune.core.paths import RunPaths
from finetune.training.checkpoints import Checkpoints, copy_result, damage, read_state
from finetune.training.state import TrainingState


@pytest.fixture
def run(tmp_path) -> RunPaths:
    return RunPaths(tmp_path)


def save(run: RunPaths, *steps: int, keep: int = 3, best: int | None = None) -> None:
    for step in steps:
        known = best if best is not None and best <= step else None
        Checkpoints(run, keep).save(FakeSession(), TrainingState(step=step, best_step=known))


def warnings_of(run: RunPaths) -> tuple[Path | None, list[str]]:
    heard: list[str] = []
    return Checkpoints(run, 3).latest(heard.append), heard


def temporaries(run: RunPaths) -> list[Path]:
    return [path for path in run.root.rglob("*") if ".tmp-" in path.name]


def test_a_saved_checkpoint_is_whole_and_gives_its_state_back(run):
    state = TrainingState(step=4, last_loss=0.1, best_step=None)
    path = Checkpoints(run, 3).save(FakeSession(), state)

    assert path == run.checkpoint(4)
    assert damage(path) == []
    assert read_state(path) == state
    assert not temporaries(run)


def test_the_last_n_and_the_best_stay(run):
    save(run, 1, 2, 3, 4, 5, 6, keep=2, best=2)

    assert Checkpoints(run, 2).steps() == [2, 5, 6]


def test_best_is_a_relative_link_that_follows_the_best_step(run):
    save(run, 1, 2, best=1)
    assert run.best.readlink() == Path("checkpoints/step-000001")
    save(run, 3, best=3)

    assert run.best.readlink() == Path("checkpoints/step-000003")
    assert run.best.resolve() == run.checkpoint(3).resolve()


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_bit_anywhere_is_found(run, seed):
    save(run, 1)
    rng = random.Random(seed)
    file = rng.choice(sorted(path for path in run.checkpoint(1).iterdir() if path.name != "MANIFEST.json"))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)

    assert damage(run.checkpoint(1)) == [f"{file.name} has changed"]
    with pytest.raises(CheckpointError, match=f"{file.name} has changed"):
        read_state(run.checkpoint(1))


def test_every_flipped_bit_is_found_and_the_checkpoint_before_is_taken(run):
    save(run, 1, 2)
    rng = random.Random(0)
    files = sorted(run.checkpoint(2).iterdir())
    assert "MANIFEST.json" in {file.name for file in files}
    for number in range(800):
        file = files[number % len(files)]
        content = file.read_bytes()
        place = rng.randrange(len(content))
        flipped = content[place] ^ (1 << rng.randrange(8))
        file.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        latest, heard = warnings_of(run)
        assert latest == run.checkpoint(1), f"byte {place} of {file.name} to {flipped}"
        assert len(heard) == 1
        assert "step-000002 is damaged" in heard[0]
        assert file.name in heard[0]
        file.write_bytes(content)
    assert warnings_of(run) == (run.checkpoint(2), [])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda folder: (folder / "state.json").write_text("{}"), "state.json has 2 bytes"),
        (lambda folder: (folder / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda folder: (folder / "MANIFEST.json").write_text('{"format": 2'), "MANIFEST.json is missing, unread"),
        (lambda folder: (folder / "MANIFEST.json").write_text('{"format": 2, "files": {"state.json": 3}}'), "unread"),
        (lambda folder: (folder / "MANIFEST.json").write_text("[]"), "unreadable"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(run, harm, words):
    save(run, 1, 2)
    harm(run.checkpoint(2))

    latest, heard = warnings_of(run)

    assert latest == run.checkpoint(1)
    assert len(heard) == 1
    assert "step-000002 is damaged" in heard[0]
    assert words in heard[0]


def test_a_file_that_a_file_manager_adds_does_no_harm(run):
    save(run, 1)
    (run.checkpoint(1) / ".DS_Store").write_bytes(b"x")

    assert damage(run.checkpoint(1)) == []


def test_a_directory_without_a_manifest_is_never_resumed_from_and_never_deleted(run):
    run.checkpoint(1).mkdir(parents=True)
    (run.checkpoint(1) / "notes.txt").write_text("mine")
    save(run, 2, 3, 4, 5, keep=1)

    assert Checkpoints(run, 1).steps() == [1, 5]
    assert (run.checkpoint(1) / "notes.txt").read_text() == "mine"


def test_damaged_ones_do_not_count_among_the_last_n(run):
    save(run, 1, 2, 3)
    (run.checkpoint(3) / "state.json").unlink()
    save(run, 4, keep=2)

    assert Checkpoints(run, 2).steps() == [2, 3, 4]


def test_saving_over_a_damaged_checkpoint_keeps_it_aside(run):
    save(run, 1, 2)
    (run.checkpoint(2) / "state.json").unlink()
    save(run, 2)

    assert damage(run.checkpoint(2)) == []
    assert (run.checkpoints / "step-000002.damaged" / "adapter_model.safetensors").is_file()


def test_rewinding_removes_the_checkpoints_that_come_after(run):
    save(run, 1, 2, 3, best=3)
    (run.checkpoint(2) / "state.json").unlink()

    Checkpoints(run, 3).rewind(1, best_step=None)

    assert Checkpoints(run, 3).steps() == [1]
    assert (run.checkpoints / "step-000002.damaged").is_dir()
    assert not run.best.is_symlink()


def test_rewinding_does_the_rotation_that_a_killed_process_did_not_come_to(run):
    save(run, 1, 2, 3, 4, best=1, keep=9)

    Checkpoints(run, 2).rewind(4, best_step=1)

    assert Checkpoints(run, 2).steps() == [1, 3, 4]


def test_there_is_no_link_to_a_best_checkpoint_that_is_gone(run):
    save(run, 2, 3)

    Checkpoints(run, 2).rewind(3, best_step=1)

    assert not run.best.is_symlink()


def test_what_a_killed_process_left_is_cleaned_and_nothing_else(run):
    save(run, 1)
    (run.checkpoints / ".step-000002.tmp-0badcafe").mkdir()
    (run.checkpoints / ".step-000002.tmp-0badcafe" / "part").write_text("x")
    (run.root / ".best.tmp-01").symlink_to("nowhere")
    (run.root / ".keep").write_text("mine")

    Checkpoints(run, 3).clean()

    assert not temporaries(run)
    assert (run.root / ".keep").exists()
    assert damage(run.checkpoint(1)) == []


class Killed(BaseException):
    """What SIGKILL is to a process."""


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_process_that_dies_while_it_saves_leaves_the_earlier_checkpoint_or_the_whole_new_one(run, monkeypatch, calls):
    save(run, 1)
    left = [calls]

    def die(_path: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr("finetune.training.checkpoints.sync", die)
    monkeypatch.setattr("finetune.training.checkpoints.shutil.rmtree", lambda *_args, **_options: None)
    with contextlib.suppress(Killed):
        save(run, 2)
    monkeypatch.undo()
    Checkpoints(run, 3).clean()

    latest, heard = warnings_of(run)
    assert latest in {run.checkpoint(1), run.checkpoint(2)}
    assert heard == []
    assert not temporaries(run)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_and_leaves_the_earlier_checkpoint_and_nothing_new(run, number):
    save(run, 1, best=1)

    class Full(FakeSession):
        def save_state(self, directory: Path) -> None:
            (directory / "optimizer.safetensors").write_bytes(b"half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(TrainingError, match=r"disk is full.*The checkpoint of step 1 is intact.*--resume"):
        Checkpoints(run, 3).save(Full(), TrainingState(step=2))
    assert Checkpoints(run, 3).steps() == [1]
    assert damage(run.checkpoint(1)) == []
    assert not temporaries(run)
    assert run.best.resolve() == run.checkpoint(1).resolve()


def test_an_engine_that_cannot_write_is_reported_in_its_own_words(run):
    class Broken(FakeSession):
        def save_weights(self, directory: Path) -> None:
            raise RuntimeError("[save] short write")

    with pytest.raises(TrainingError, match=r"short write.*There is no earlier checkpoint"):
        Checkpoints(run, 3).save(Broken(), TrainingState(step=2))


def test_the_result_holds_the_weights_and_nothing_of_the_training(run):
    save(run, 1)
    run.adapter.mkdir()
    (run.adapter / "old.txt").write_text("from before")

    copy_result(run.checkpoint(1), run.adapter)

    assert sorted(path.name for path in run.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not temporaries(run)

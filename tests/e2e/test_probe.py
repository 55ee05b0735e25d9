"""The process that tries a step for `batch_size: auto`: how it ends, and what it leaves when something else ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import write_rows

from finetune.config.load import load_config
from finetune.planning.probe import NotTaken, ProbedRun, Taken, probe
from finetune.workflows.preparation import prepare

SECONDS = 100  # until which everything must have happened, on a busy machine


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    write_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


def wait_for(find: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def begun_probe(run: subprocess.Popen[str]) -> psutil.Process | None:
    """The process that tries a step, once it is well under way.

    Known by its command: for a moment every other child (`ldconfig`, `git`) looks as large as the run that starts it.
    """
    for child in psutil.Process(run.pid).children():
        with suppress(psutil.NoSuchProcess):
            if any("planning.probe" in word for word in child.cmdline()) and child.memory_info().rss > 60_000_000:
                return child
    return None


@contextmanager
def auto_run(material: Path, place: Path, backend: str = "mlx") -> Iterator[subprocess.Popen[str]]:
    """`ft train` with `--batch-size auto` in a process whose temporary files are below `place`."""
    (place / "tmp").mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "finetune", "train", "start", str(material / "model"), str(material / "rows.jsonl"),
        "--output", str(place / "run"), "--backend", backend, "--batch-size", "auto", "--max-steps", "2",
    ]  # fmt: skip
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(place / "tmp")},
    )
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_while_a_step_is_tried_leaves_nothing(
    material: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with auto_run(material, tmp_path) as run:
        child = wait_for(lambda: begun_probe(run))
        run.send_signal(number)
        said, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 128 + number, said
    assert "Stopped" in said
    assert "Traceback" not in said
    wait_for(lambda: is_gone(child))  # one that has just begun ends by itself, when it sees that nobody waits for it
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_killed_takes_the_process_that_tries_a_step_with_it(material: Path, tmp_path: Path) -> None:
    with auto_run(material, tmp_path) as run:
        child = wait_for(lambda: begun_probe(run))
        run.kill()
        wait_for(lambda: is_gone(child))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_a_probe_that_the_system_kills_did_not_fit_and_a_smaller_step_is_taken(material: Path, tmp_path: Path) -> None:
    """As the kernel does where memory runs out."""
    with auto_run(material, tmp_path) as run:
        child = wait_for(lambda: begun_probe(run))
        child.send_signal(signal.SIGKILL)
        said, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, said
    assert "training.batch_size=auto: 4 rows a step" in said
    assert "all in memory at once, activations kept" not in said
    assert (tmp_path / "run" / "adapter").is_dir()


def try_step(material: Path, *, leave: int, model: Path | None = None) -> Taken | NotTaken:
    sections = {
        "model": {"name": str(material / "model"), "backend": "mlx"},
        "data": {"train_file": str(material / "rows.jsonl")},
        "training": {"max_steps": 1},
    }
    flags = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    prepared = prepare(load_config(None, environ={}, flags=flags))
    config = prepared.config
    run = ProbedRun(model or prepared.source.path, config.model, config.training, config.lora, spares=False)
    return probe(run, prepared.batches.step(0), leave=leave)


def test_a_step_that_would_take_the_last_of_the_memory_is_ended_before(material: Path) -> None:
    found = try_step(material, leave=2 * psutil.virtual_memory().total)
    assert isinstance(found, NotTaken)
    assert (found.why, found.for_memory) == ("it came close to the last of the memory", True)


def test_what_is_wrong_besides_memory_is_told_apart(material: Path, tmp_path: Path) -> None:
    found = try_step(material, leave=0, model=tmp_path / "nowhere")
    assert isinstance(found, NotTaken)
    assert not found.for_memory
    assert str(tmp_path / "nowhere") in found.why

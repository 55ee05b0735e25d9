"""Runs that are stopped at random moments and resumed end with the very bytes of an uninterrupted one.

`FT_TEST_KILLS=100 pytest tests/e2e/test_resume_kills.py` kills 200 times with SIGKILL, 100 on each engine, and stops
80 times with SIGTERM and SIGINT in between.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import write_tiny_model

KILLS = int(os.environ.get("FT_TEST_KILLS", "10"))  # SIGKILLs on each engine
STEPS = 36
REPOSITORY = Path(__file__).resolve().parents[2]
SERVER = REPOSITORY / "tests" / "support" / "fork_server.py"
BY_HAND = {signal.SIGTERM: {143, -signal.SIGTERM}, signal.SIGINT: {130}, signal.SIGKILL: {-signal.SIGKILL}}


class ForkServer:
    """`ft` commands in processes that start at once."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ft(self, *arguments: object, kill: signal.Signals | None = None, after: float = 0.0) -> int:
        """Run a command, send it a signal after some seconds if it still lives, and return its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        pid = self._answer()["pid"]
        timer = threading.Timer(after, _send, (pid, kill)) if kill is not None else None
        if timer is not None:
            timer.start()
        code = int(self._answer()["code"])
        if timer is not None:
            timer.cancel()
            timer.join()
        return code

    def close(self) -> None:
        self._process.communicate(timeout=30)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass(frozen=True)
class World:
    """A server, the arguments that start a run in a directory, and the uninterrupted run."""

    server: ForkServer
    folder: Path
    whole: Path
    seconds: float
    backend: str

    def start(self, run: Path) -> tuple[str, ...]:
        where = ("--config", "run.yml", "--backend", self.backend, "--output", str(run))
        return ("train", "start", "model", "rows.jsonl", *where)


CONFIG = f"""
lora: {{rank: 4, dropout: 0.2}}
training: {{max_steps: {STEPS}, batch_size: 4, gradient_accumulation_steps: 2, learning_rate: 3e-3, seed: 5}}
data: {{template: chatml, validation_split: 0.2}}
output: {{eval_steps: 8, checkpoint_steps: 3, keep_checkpoints: 2, sample_prompts: 1, sample_tokens: 6}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ForkServer, Path]]:
    """A server for the runs of both engines, and the folder that it works in."""
    folder = tmp_path_factory.mktemp("kills")
    write_tiny_model(folder / "model")
    rows = [{"prompt": f"count from {n}", "completion": f"{n} {n + 1} {n + 2}"} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yml").write_text(CONFIG)
    server = ForkServer(folder)
    yield server, folder
    server.close()


@pytest.fixture(scope="module", params=["mlx", "pytorch"])
def world(request: pytest.FixtureRequest, server: tuple[ForkServer, Path]) -> World:
    fork_server, folder = server
    world = World(fork_server, folder, folder / f"whole-{request.param}", 0.0, request.param)
    began = time.monotonic()
    assert fork_server.ft(*world.start(world.whole)) == 0, (folder / "ft.log").read_text()
    return replace(world, seconds=time.monotonic() - began)


def final_state(run: Path) -> dict[str, Any]:
    """Everything of a run that does not depend on the clock."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((run / "report.json").read_text())
    state = json.loads((last / "state.json").read_text())
    clock = {"step_seconds", "elapsed_seconds", "peak_memory_bytes"}
    return {
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
        "state": {key: value for key, value in state.items() if key not in clock},
        "best": (run / "best").readlink(),
        "steps": [(e["step"], e["loss"], e["learning_rate"], e["grad_norm"]) for e in events if e["event"] == "step"],
        "evaluations": [(e["step"], e["loss"], e["is_best"]) for e in events if e["event"] == "eval"],
        "samples": [(e["step"], e["output"]) for e in events if e["event"] == "sample"],
        "report": {key: report[key] for key in report if "loss" in key or key in {"perplexity", "steps", "rows"}},
        "checkpoints": _last_and_count(run),
    }


def _last_and_count(run: Path) -> tuple[str, int]:
    """Not all names: a run that was stopped by hand in its last steps keeps the checkpoint of that stop."""
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    return names[-1], len(names)


def test_random_kills_leave_no_trace_in_the_result(world: World) -> None:
    rng = random.Random(20)
    expected = final_state(world.whole)
    signals = [*[signal.SIGKILL] * 5, signal.SIGTERM, signal.SIGINT]
    killed: Counter[int] = Counter()
    attempt = 0
    while killed[signal.SIGKILL] < KILLS:
        attempt += 1
        run = world.folder / f"{world.backend}-{attempt}"
        command: tuple[object, ...] = world.start(run)
        code = None
        while code != 0:
            done = sum(killed.values())
            number = signals[done % len(signals)] if killed[signal.SIGKILL] < KILLS else None
            code = world.server.ft(*command, kill=number, after=rng.uniform(0.05, world.seconds / 2))
            if number is not None and code in BY_HAND[number]:
                killed[number] += 1
            else:
                assert code == 0, (world.folder / "ft.log").read_text()[-3000:]
            if (run / "run.json").exists():
                command = ("train", "--resume", run)
        assert final_state(run) == expected, f"run {attempt} after {dict(killed)}"
    assert set(killed) == set(BY_HAND)

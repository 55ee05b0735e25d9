"""What happens to a run when the disk, the memory, the clock or the files fail under it: said clearly, nothing lost."""

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tests.support.in_process import ft_here
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import write_rows

import finetune
from finetune.core.events import Event, StepCompleted
from finetune.core.paths import RunPaths
from finetune.core.types import Batch
from finetune.engines.base import PendingStep, TrainSession
from finetune.engines.mlx.train import MLXTrainSession
from finetune.engines.torch.train import TorchTrainSession
from finetune.training.checkpoints import damage
from finetune.training.run_directory import held

STEPS = 6
on_each_engine = pytest.mark.parametrize("backend", ["mlx", "pytorch"])
Mount = Callable[..., Path]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    write_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system of some kilobytes, or the same one with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def call(options: str) -> Path:
        again = "remount," if place.is_mount() else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a file system can be mounted by root only ({done.stderr.decode().strip()})")
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield call
    if place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


def command(
    material: Path, run: Path, backend: str = "mlx", *more: str, steps: int = STEPS, method: str = "lora"
) -> tuple[object, ...]:
    rank = ("lora.rank=4",) if method == "lora" else ()
    sets = ("output.checkpoint_steps=2", "output.eval_steps=2", "output.sample_prompts=1", *rank, *more)
    options = [part for setting in sets for part in ("--set", setting)]
    where = (material / "model", material / "rows.jsonl", "--output", run, "--backend", backend, "--method", method)
    return ("train", "start", *where, "--max-steps", steps, *options)


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["mlx", "pytorch"])
def whole(request: pytest.FixtureRequest, material: Path) -> tuple[str, Path]:
    """An engine, and the run that nothing happened to."""
    run = material / f"whole-{request.param}"
    ran = ft_here(*command(material, run, request.param))
    assert ran.code == 0, ran.err
    return request.param, run


def require_failure(code: int, said: str) -> None:
    assert code == 1, said
    assert "Traceback" not in said
    assert "fault in finetune" not in said, said


@pytest.mark.parametrize("kilobytes", [8, 60, 130, 200])
def test_a_disk_that_fills_up_costs_no_checkpoint(
    material: Path, whole: tuple[str, Path], mount: Mount, kilobytes: int
) -> None:
    backend, expected = whole
    run = mount(f"size={kilobytes}k") / "run"
    ran = ft_here(*command(material, run, backend))
    require_failure(ran.code, ran.err)
    assert str(run) in ran.err
    assert "No space left on device" in ran.err or "disk is full" in ran.err or "room" in ran.err, ran.err
    checkpoints = sorted((run / "checkpoints").glob("*")) if run.exists() else []
    assert all(damage(place) == [] for place in checkpoints)

    mount("size=20m")
    again = ("train", "--resume", run) if run.exists() else command(material, run, backend)
    resumed = ft_here(*again)
    assert resumed.code == 0, resumed.err
    assert adapter_of(run) == adapter_of(expected)


def test_a_run_in_a_place_that_is_read_only(material: Path, mount: Mount) -> None:
    disk = mount("size=20m")
    assert ft_here(*command(material, disk / "run")).code == 0
    mount("ro")
    for asked in (command(material, disk / "other"), ("train", "--resume", disk / "run")):
        ran = ft_here(*asked)
        assert ran.code in {1, 2}
        assert "Read-only file system" in ran.err
        assert str(disk) in ran.err
        assert "fault in finetune" not in ran.err, ran.err


def test_a_cache_that_is_read_only_is_done_without(
    material: Path, mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models import conversions

    monkeypatch.setattr(conversions, "LEAST_BYTES", 0)
    monkeypatch.setenv("FT_CACHE_DIR", str(mount("size=20m") / "cache"))
    mount("ro")
    ran = ft_here(*command(material, tmp_path / "run", "mlx", "model.quantization=4bit"))
    assert ran.code == 0, ran.err
    assert "cannot be kept in" in ran.out + ran.err


def test_a_place_below_a_file(material: Path) -> None:
    ran = ft_here(*command(material, material / "rows.jsonl" / "run"))
    assert ran.code == 2
    assert "rows.jsonl" in ran.err


def settings(material: Path, run: Path) -> dict[str, dict[str, object]]:
    return {
        "model": {"name": str(material / "model"), "backend": "mlx"},
        "data": {"train_file": str(material / "rows.jsonl")},
        "lora": {"rank": 4},
        "training": {"max_steps": STEPS},
        "output": {"output_dir": str(run), "checkpoint_steps": 2, "sample_prompts": 0},
    }


def test_a_data_file_that_changes_and_vanishes_during_a_run(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("rows.jsonl", "model"):
        (folder / name).symlink_to(material / name) if name == "model" else shutil.copy(material / name, folder)

    def spoil(event: Event) -> None:
        if isinstance(event, StepCompleted) and event.step == 2:
            (folder / "rows.jsonl").write_text("nothing of what was there")
        if isinstance(event, StepCompleted) and event.step == 4:
            (folder / "rows.jsonl").unlink()

    finetune.train(settings(folder, tmp_path / "run"), listeners=[spoil])
    finetune.train(settings(material, tmp_path / "calm"))

    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "calm")
    ran = ft_here("train", "--resume", tmp_path / "run")
    require_failure(ran.code, ran.err)
    assert f"{folder / 'rows.jsonl'}: there is no such file" in ran.err


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_jumps_changes_no_duration(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    true_time = time.time

    def jump(event: Event) -> None:
        if isinstance(event, StepCompleted) and event.step == 3:
            monkeypatch.setattr(time, "time", lambda: true_time() + hours * 3600)

    finetune.train(settings(material, tmp_path / "run"), listeners=[jump])
    paths = RunPaths(tmp_path / "run")
    times = [
        event["time"] for event in map(json.loads, paths.metrics.read_text().splitlines()) if event["event"] == "step"
    ]
    assert times == sorted(times)
    assert 0 < times[-1] < 3600
    assert json.loads(paths.report.read_text())["training_time_seconds"] < 3600


def test_two_runs_of_one_second_have_directories_of_their_own(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.workflows import train

    class Stopped(train.datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Stopped":
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(train, "datetime", Stopped)
    monkeypatch.chdir(tmp_path)
    asked = settings(material, tmp_path)
    del asked["output"]["output_dir"]
    asked["training"]["max_steps"] = 1
    first, second = (finetune.train(asked).run_dir for _ in range(2))
    assert first != second


@pytest.mark.parametrize("tail", ['{"event": "step", "st', "\x00\x00\x00"])
def test_a_torn_log_is_mended_on_resuming(material: Path, whole: tuple[str, Path], tmp_path: Path, tail: str) -> None:
    _, expected = whole
    run = shutil.copytree(expected, tmp_path / "run", symlinks=True)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
    with (run / "metrics.jsonl").open("a") as log:
        log.write(tail)
    ran = ft_here("train", "--resume", run)
    assert ran.code == 0, ran.err
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, STEPS + 1))
    assert adapter_of(run) == adapter_of(expected)


def test_a_second_process_in_a_run(whole: tuple[str, Path]) -> None:
    _, run = whole
    with held(RunPaths(run)):
        ran = ft_here("train", "--resume", run)
    require_failure(ran.code, ran.err)
    assert f"Another process is training in {run}" in ran.err


def test_a_flipped_bit_in_the_latest_checkpoint(whole: tuple[str, Path], tmp_path: Path) -> None:
    _, expected = whole
    run = shutil.copytree(expected, tmp_path / "run", symlinks=True)
    file = run / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    ran = ft_here("train", "--resume", run)
    assert ran.code == 0, ran.err
    assert "step-000006 is damaged and is left alone (optimizer.safetensors has changed)" in ran.out + ran.err
    assert adapter_of(run) == adapter_of(expected)
    assert (run / "checkpoints" / "step-000006.damaged").is_dir()


@on_each_engine
def test_a_loss_that_is_not_finite_goes_back_and_says_what_to_lower(
    material: Path, tmp_path: Path, backend: str
) -> None:
    shutil.copytree(material / "model", tmp_path / "model")
    shutil.copy(material / "rows.jsonl", tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"][:] = 3e38  # finite, and no sum of two is
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    ran = ft_here(*command(tmp_path, run, backend, "training.max_steps=40"))
    require_failure(ran.code, ran.err)
    assert "was not finite (NaN or infinite) in 5 steps in a row" in ran.err
    assert "a lower training.learning_rate" in ran.err
    skipped = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"skipped"' in line]
    assert len(skipped) == 5


@on_each_engine
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_loss_is_lost_in_the_middle_goes_on_from_its_last_good_checkpoint(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, method: str
) -> None:
    """Step 5 throws the weights so far that no later loss is finite; checkpoints are due at every second step."""
    session = MLXTrainSession if backend == "mlx" else TorchTrainSession
    true_step, calls = session.step, iter(range(1, 100))

    def step(self: TrainSession, batches: Sequence[Batch], *, learning_rate: float) -> PendingStep:
        return true_step(self, batches, learning_rate=1e25 if next(calls) == 5 else learning_rate)

    run = tmp_path / "run"
    more = ("output.keep_checkpoints=1", "output.eval_steps=50")
    with monkeypatch.context() as patched:
        patched.setattr(session, "step", step)
        ran = ft_here(*command(material, run, backend, *more, steps=30, method=method))
    require_failure(ran.code, ran.err)
    last = run / "checkpoints" / "step-000004"
    assert "was not finite (NaN or infinite) in 5 steps in a row, 6 to 10" in ran.err
    assert f"The run is back at {last}." in ran.err
    assert [place.name for place in (run / "checkpoints").iterdir()] == [last.name]
    assert damage(last) == []

    lower = ["training.learning_rate=1e-5"]
    if method == "lora":
        assert "--from-adapter names that directory" in ran.err
        lower.append(f"lora.init_from={last}")
    again = ft_here(*command(material, tmp_path / "again", backend, *lower, steps=2, method=method))
    assert again.code == 0, again.err
    events = map(json.loads, (tmp_path / "again" / "metrics.jsonl").read_text().splitlines())
    assert all(math.isfinite(event["loss"]) for event in events if event["event"] == "step")
    resumed = ft_here("train", "--resume", run)
    assert resumed.code == 0, resumed.err


def test_a_run_that_ends_before_its_loss_is_given_up_still_has_a_report(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_step, calls = MLXTrainSession.step, iter(range(1, 100))
    far = lambda *given, learning_rate: true_step(*given, learning_rate=1e25 if next(calls) == 2 else learning_rate)  # noqa: E731
    monkeypatch.setattr(MLXTrainSession, "step", far)
    ran = ft_here(*command(material, tmp_path / "run", "mlx", "data.validation_split=0.3", steps=4))
    assert ran.code == 0, ran.err
    assert "not finite since" in ran.out
    assert (tmp_path / "run" / "report.html").is_file()


LIMITED = """
import ctypes, json, resource, sys
import psutil, finetune
from finetune.core.errors import FinetuneError
from finetune.core.events import CheckpointSaved

def limit(event):
    if isinstance(event, CheckpointSaved) and event.step == 2:
        if "mlx.core" in sys.modules:
            sys.modules["mlx.core"].clear_cache()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps have freed would be enough for the next
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 20_000_000,) * 2)

try:
    finetune.train(json.loads(sys.argv[1]), listeners=[limit])
except FinetuneError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on the address space are Linux's")
@on_each_engine
def test_memory_that_runs_out_in_the_middle(material: Path, tmp_path: Path, backend: str) -> None:
    rows = [{"prompt": f"{number}", "completion": f"{number % 7}" * 180} for number in range(200)]
    write_rows(tmp_path / "rows.jsonl", rows)
    asked = settings(material, tmp_path / "run")
    asked["model"]["backend"] = backend
    asked["data"]["train_file"] = str(tmp_path / "rows.jsonl")
    asked["training"] = {"max_steps": STEPS, "batch_size": 128, "gradient_accumulation_steps": 1, "method": "full"}
    del asked["lora"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(asked)], capture_output=True, text=True, timeout=120, check=False
    )
    if backend == "pytorch" or done.returncode > 0:  # MLX may die of it where it computes: no library can catch that
        require_failure(done.returncode, done.stderr)
        assert "emory" in done.stderr
        assert "training.batch_size" in done.stderr
    assert done.returncode != 0
    assert damage(tmp_path / "run" / "checkpoints" / "step-000002") == []
    resumed = ft_here("train", "--resume", tmp_path / "run")
    assert resumed.code == 0, resumed.err


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("size", [100, 3_000, 12_000])
def test_a_limit_on_the_size_of_files(material: Path, whole: tuple[str, Path], tmp_path: Path, size: int) -> None:
    backend, expected = whole
    run = tmp_path / "run"
    with files_of_at_most(size):
        ran = ft_here(*command(material, run, backend))
    require_failure(ran.code, ran.err)
    assert str(run) in ran.err
    assert all(damage(place) == [] for place in (run / "checkpoints").glob("*"))
    again = ("train", "--resume", run) if run.exists() else command(material, run, backend)
    assert ft_here(*again).code == 0
    assert adapter_of(run) == adapter_of(expected)

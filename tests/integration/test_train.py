"""`ft train` as a whole, on a tiny model and the real engine."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import write_tiny_model

import finetune
from finetune.core.errors import CheckpointError, ConfigError, DataError, FinetuneError, TrainingError, UsageError
from finetune.core.events import Event, Notice, RunStarted
from finetune.core.paths import RunPaths
from finetune.training.checkpoints import Checkpoints, damage

STEPS = 6


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    rows = [{"prompt": f"count from {n}", "completion": f"{n} {n + 1} {n + 2}"} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(material: Path, run: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(material / "model")},
        "lora": {"rank": 2},
        "training": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-2},
        "data": {"train_file": str(material / "rows.jsonl"), "template": "chatml"},
        "output": {"output_dir": str(run), "eval_steps": 3, "checkpoint_steps": 2, "sample_tokens": 4},
    }
    return {name: values | changes.get(name, {}) for name, values in sections.items()}


@pytest.fixture
def run(material: Path, tmp_path: Path) -> RunPaths:
    """A finished run."""
    return RunPaths(finetune.train(config(material, tmp_path / "run")).run_dir)


def test_a_run_leaves_everything_that_the_layout_promises(material, tmp_path):
    result = finetune.train(config(material, tmp_path / "run"))
    paths = RunPaths(tmp_path / "run")

    for file in (paths.config, paths.run_info, paths.metrics, paths.log, paths.report, paths.report_page):
        assert file.stat().st_size > 0
    report = json.loads(paths.report.read_text())
    assert report["best_eval_loss"] < report["initial_eval_loss"]
    assert report["rows"]["read"] == 30
    assert result.adapter == paths.adapter
    assert result.model is None
    assert result.metrics == report
    assert (paths.adapter / "adapter_model.safetensors").read_bytes() == (
        paths.best / "adapter_model.safetensors"
    ).read_bytes()


def test_the_resolved_configuration_repeats_the_run_to_the_byte(run, tmp_path):
    loaded = finetune.load_config(run.config, overrides=[f"output.output_dir={tmp_path / 'again'}"])
    again = RunPaths(finetune.train(loaded).run_dir)

    assert (again.adapter / "adapter_model.safetensors").read_bytes() == (
        run.adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_full_fine_tuning_leaves_a_whole_model(material, tmp_path):
    changes = {"training": {"method": "full", "max_steps": 2}, "lora": {"rank": 16}}
    settings = config(material, tmp_path / "run", **changes)
    del settings["lora"]
    result = finetune.train(settings)

    assert result.adapter is None
    assert result.model is not None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in result.model.iterdir()}


def test_an_evaluation_reads_as_many_rows_as_it_is_told_at_even_distances(material, tmp_path):
    rows = [json.dumps({"prompt": f"say {n}", "completion": f"{n} {n * 7}"}) for n in range(6)]
    started: list[Event] = []
    losses = []
    for name, held_out, output in (("some", rows, {"eval_rows": 2}), ("picked", [rows[0], rows[3]], {})):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(held_out))
        changes = {"data": {"validation_file": str(tmp_path / f"{name}.jsonl")}, "output": output}
        settings = config(material, tmp_path / name, training={"max_steps": 1}, **changes)
        losses.append(finetune.train(settings, listeners=[started.append]).metrics["initial_eval_loss"])

    assert losses[0] == losses[1]
    assert [event.validation_rows for event in started if isinstance(event, RunStarted)] == [2, 2]


def test_inferred_values_are_said_before_the_first_step(material, tmp_path):
    heard: list[Event] = []
    finetune.train(config(material, tmp_path / "run"), listeners=[heard.append])
    started = next(index for index, event in enumerate(heard) if isinstance(event, RunStarted))
    said = " ".join(event.message for event in heard[:started] if isinstance(event, Notice))

    assert "training.warmup_steps=0" in said
    assert "max_length" in said


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": {"name": "absent"}}, FinetuneError, "absent"),
        ({"data": {"train_file": "absent.jsonl"}}, FinetuneError, "absent.jsonl"),
        ({"data": {"template": "nonsense"}}, UsageError, "nonsense"),
        ({"training": {"learning_rate": -1}}, ConfigError, "learning_rate"),
        ({"lora": {"target_modules": ["nothing"]}}, ConfigError, "nothing"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_left(material, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        finetune.train(config(material, tmp_path / "run", **changes))

    assert not (tmp_path / "run").exists()


def test_a_directory_with_a_run_is_refused_before_the_data_is_read(run, material):
    with pytest.raises(UsageError, match="holds a run already"):
        finetune.train(config(material, run.root, data={"train_file": "absent.jsonl"}))


def test_changed_data_is_refused_with_what_differs(material, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes((material / "rows.jsonl").read_bytes())
    settings = config(material, tmp_path / "run", data={"train_file": str(tmp_path / "rows.jsonl")})
    finetune.train(settings)
    lines = (tmp_path / "rows.jsonl").read_text().replace("count from 7", "count from 8", 1)
    (tmp_path / "rows.jsonl").write_text(lines)

    with pytest.raises(CheckpointError, match=r"data file 1 \(rows\.jsonl\) sha256 was"):
        finetune.resume(tmp_path / "run")


def test_changed_model_files_are_refused(tmp_path, material):
    write_tiny_model(tmp_path / "model")
    finetune.train(config(material, tmp_path / "run", model={"name": str(tmp_path / "model")}))
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"model model\.safetensors was"):
        finetune.resume(tmp_path / "run")


def test_a_configuration_that_means_other_steps_is_refused(run):
    with pytest.raises(UsageError, match=r"training\.learning_rate was 0\.01 and is now 0\.02"):
        finetune.resume(run.root, overrides=["training.learning_rate=0.02"])


def test_a_run_that_was_moved_goes_on(run, tmp_path):
    run.root.rename(tmp_path / "moved")
    result = finetune.resume(tmp_path / "moved", overrides=["output.keep_checkpoints=1"])

    assert result.metrics["steps"] == STEPS


def test_resuming_from_an_earlier_checkpoint_ends_with_the_same_bytes(run):
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    earliest = run.checkpoint(Checkpoints(run, 3).steps()[0])
    assert earliest != run.checkpoint(STEPS)

    finetune.resume(earliest)

    again = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert [(e["step"], e["loss"]) for e in again if e["event"] == "step"] == [
        (e["step"], e["loss"]) for e in metrics if e["event"] == "step"
    ]


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(run):
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    state = run.checkpoint(STEPS) / "optimizer.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 4
    state.write_bytes(content)
    heard: list[Event] = []

    finetune.resume(run.root, listeners=[heard.append])

    warnings = [event.message for event in heard if isinstance(event, Notice)]
    assert any("optimizer.safetensors has changed" in message for message in warnings)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert damage(run.checkpoint(STEPS)) == []
    assert (run.checkpoints / f"step-{STEPS:06d}.damaged").is_dir()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk looks like to a program, without one: larger files cannot be written."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_the_run_with_a_clear_message_and_no_half_checkpoint(material, tmp_path):
    with files_of_at_most(12_000), pytest.raises(TrainingError, match=r"disk is full.*nothing of the new one is left"):
        finetune.train(config(material, tmp_path / "run"))

    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    result = finetune.resume(tmp_path / "run")
    assert result.metrics["steps"] == STEPS


def test_a_run_directory_that_cannot_be_written_is_taken_away(material, tmp_path):
    with files_of_at_most(100), pytest.raises(TrainingError, match="cannot be written"):
        finetune.train(config(material, tmp_path / "run"))

    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError):
        finetune.train(config(material, tmp_path / "run", data={"train_file": "absent.jsonl"}))

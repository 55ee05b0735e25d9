"""What RUN, --model, --adapter and --checkpoint mean together, and what is said where they mean nothing."""

import json
from pathlib import Path

import pytest

from finetune.core.errors import FinetuneError
from finetune.workflows.subjects import find_subject, is_run, open_run


def make_run(root: Path, *, method: str = "lora", steps: tuple[int, ...] = (10, 20), best: int | None = 10) -> Path:
    root.mkdir(parents=True)
    config = {
        "model": {"name": "org/base", "dtype": "float32"},
        "data": {"train_file": "rows.jsonl", "template": "chatml"},
    }
    (root / "config.yml").write_text(json.dumps({**config, "training": {"method": method}}))  # JSON is YAML
    (root / "run.json").write_text(json.dumps({"format": 1, "template": {"name": "chatml"}}))
    for step in steps:
        make_adapter(root / "checkpoints" / f"step-{step:06d}")
    if best is not None:
        (root / "best").symlink_to(f"checkpoints/step-{best:06d}")
    (root / ("model" if method == "full" else "adapter")).mkdir()
    return root


def make_adapter(path: Path, base: str = "org/base") -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    return path


def test_a_run_gives_model_adapter_and_template(tmp_path: Path) -> None:
    subject = find_subject(make_run(tmp_path / "run"))
    assert (subject.model.name, subject.model.dtype) == ("org/base", "float32")
    assert subject.adapter == tmp_path / "run" / "adapter"
    assert subject.run is not None
    assert subject.checkpoint == "adapter"


@pytest.mark.parametrize("place", ["model", "adapter"])
def test_a_run_may_stand_in_for_a_model_or_an_adapter(tmp_path: Path, place: str) -> None:
    run = make_run(tmp_path / "run")
    subject = find_subject(model=str(run)) if place == "model" else find_subject(adapter=run)
    assert subject == find_subject(run)


@pytest.mark.parametrize(
    ("checkpoint", "step", "called"),
    [("best", 10, "best (step 10)"), ("last", 20, "last (step 20)"), ("20", 20, "step 20")],
)
def test_a_checkpoint_is_chosen_by_name_or_step(tmp_path: Path, checkpoint: str, step: int, called: str) -> None:
    run = make_run(tmp_path / "run")
    subject = find_subject(run, checkpoint=checkpoint)
    assert subject.adapter == run / "checkpoints" / f"step-{step:06d}"
    assert subject.checkpoint == called


def test_a_run_that_was_stopped_early_offers_its_best_checkpoint_else_its_last(tmp_path: Path) -> None:
    for best, step in ((10, 10), (None, 20)):
        run = make_run(tmp_path / f"run-{best}", best=best)
        (run / "adapter").rmdir()
        assert find_subject(run).adapter == run / "checkpoints" / f"step-{step:06d}"


def test_full_fine_tuning_gives_a_whole_model(tmp_path: Path) -> None:
    subject = find_subject(make_run(tmp_path / "run", method="full"))
    assert subject.adapter is None
    assert subject.tuned_model == tmp_path / "run" / "model"


def test_an_adapter_names_its_base_and_finds_the_run_that_it_lies_in(tmp_path: Path) -> None:
    alone = find_subject(adapter=make_adapter(tmp_path / "alone", base="org/other"))
    assert (alone.model.name, alone.run) == ("org/other", None)

    checkpoint = make_run(tmp_path / "run") / "checkpoints" / "step-000010"
    inside = find_subject(adapter=checkpoint, model="org/moved")
    assert (inside.model.name, inside.model.dtype) == ("org/moved", "float32")
    assert inside.run is not None


def test_a_model_may_be_given_beside_a_run_that_has_an_adapter(tmp_path: Path) -> None:
    subject = find_subject(make_run(tmp_path / "run"), model="org/moved")
    assert subject.model.name == "org/moved"
    assert subject.adapter is not None


def test_a_missing_checkpoint_lists_those_that_exist(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(FinetuneError, match=r"no checkpoint '15'. There are: best, last, 10, 20\."):
        find_subject(run, checkpoint="15")


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(), best=None)
    with pytest.raises(FinetuneError, match="It has none"):
        find_subject(run, checkpoint="best")


def test_wrong_requests_say_what_is_wrong(tmp_path: Path) -> None:
    run, other, adapter = make_run(tmp_path / "run"), make_run(tmp_path / "other"), make_adapter(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    wrong = [
        ({"run": tmp_path / "nowhere"}, "is not a run: nothing is there"),
        ({"run": tmp_path / "empty"}, "is not a run: it is empty"),
        ({"run": adapter}, "is not a run: it holds adapter_config.json"),
        ({"run": run, "adapter": adapter}, "Both a run"),
        ({"run": run, "adapter": other}, "Two runs"),
        ({"adapter": tmp_path / "empty"}, "No adapter at"),
        ({"adapter": make_adapter(tmp_path / "baseless", base="")}, "names no base model"),
        ({"model": "org/base", "checkpoint": "best"}, "needs a run"),
        ({}, "Nothing to load"),
        ({"run": make_run(tmp_path / "full", method="full"), "model": "org/base"}, "tuned every weight"),
    ]
    for arguments, message in wrong:
        with pytest.raises(FinetuneError, match=message):
            find_subject(**arguments)  # type: ignore[arg-type]


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    assert is_run(run)
    with pytest.raises(FinetuneError, match=r"run\.json cannot be read"):
        open_run(run)

"""`ft evaluate` on real runs of a tiny model: the same rows as the run, base beside tuned."""

import json
from pathlib import Path

import pytest
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model
from tests.support.tiny_run import tiny_run, write_rows

from finetune.core.errors import DataError
from finetune.workflows.evaluate import evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return tiny_run(tmp_path_factory.mktemp("lora"), model)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return tiny_run(tmp_path_factory.mktemp("full"), model, method="full")


def report(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "report.json").read_text()))


@pytest.mark.parametrize("kind", ["run", "full_run"])
def test_base_and_tuned_have_the_losses_that_the_run_reported(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    result = evaluate(run, generate=1)
    assert result.tuned is not None
    assert result.base.loss == pytest.approx(report(run)["initial_eval_loss"], rel=1e-5)
    assert result.tuned.loss == pytest.approx(report(run)["best_eval_loss"], rel=1e-5)
    assert result.tuned.loss < result.base.loss
    assert len(result.samples) == 1
    assert result.samples[0].base != result.samples[0].tuned


def test_a_model_that_started_from_random_weights_is_read_from_its_files(model: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model, method="full", init="random")
    notices: list[str] = []
    result = evaluate(run, generate=0, on_notice=notices.append)
    assert result.tuned is not None
    assert result.tuned.loss == pytest.approx(report(run)["best_eval_loss"], rel=1e-5)
    assert "random weights" in notices[0]
    assert ft("generate", "--model", run, "--prompt", "Say red", "--max-tokens", 2).code == 0
    assert ft("export", run, "--format", "merged", "--output", tmp_path / "out").code == 0


def test_the_json_document_has_what_scripts_rely_on(run: Path) -> None:
    ran = ft("evaluate", run, "--checkpoint", "last", "--generate", 2, "--json")
    document = ran.json
    assert ran.code == 0
    assert document["checkpoint"] == "last (step 6)"
    for which in ("base", "tuned"):
        assert {"loss", "perplexity", "accuracy", "exact_match"} <= document[which].keys()
    assert document["rows"] == report(run)["validation_rows"]
    assert {"prompt", "expected", "base", "tuned", "scores"} == document["samples"][0].keys()
    assert document["samples"][0]["scores"]["tuned"]["exact"] in {True, False}
    assert document["seconds"] > 0


def test_a_checkpoint_is_evaluated_by_its_step(run: Path) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [expected] = [event["loss"] for event in events if event["event"] == "eval" and event["step"] == 3]
    result = evaluate(run, checkpoint="3", generate=0)
    assert result.tuned is not None
    assert result.tuned.loss == pytest.approx(expected, rel=1e-5)
    assert (result.samples, result.tuned.exact_match) == ((), None)


def test_the_table_shows_both_models_and_their_answers(run: Path) -> None:
    out = ft("evaluate", run, "--generate", 1).out
    for words in ("base", "tuned", "perplexity", "token accuracy", "exact match", "Prompt", "Expected"):
        assert words in out


def test_a_file_gives_other_rows_with_the_template_of_the_run(run: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "other.jsonl", [{"prompt": "Say six", "completion": "SIX"}] * 2)
    result = evaluate(run, data=rows, generate=1)
    assert (result.rows, result.data) == (2, str(rows))
    assert result.samples[0].prompt == "<|im_start|>user\nSay six<|im_end|>\n<|im_start|>assistant\n"
    assert evaluate(run, data=rows, generate=0, limit=1).rows == 1


def test_results_are_written_whole_or_line_by_line(run: Path, tmp_path: Path) -> None:
    whole, lines = tmp_path / "results.json", tmp_path / "answers.jsonl"
    printed = ft("evaluate", run, "--generate", 2, "--output", whole, "--json").json
    written = json.loads(whole.read_text())
    assert {**written, "seconds": 0}.keys() == printed.keys()
    assert written["samples"] == printed["samples"]
    assert ft("evaluate", run, "--generate", 2, "--output", lines).code == 0
    assert [json.loads(line) for line in lines.read_text().splitlines()] == printed["samples"]


def test_json_answers_are_compared_as_json(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Call", "completion": '{"b": 1, "a": 2}'}] * 2)
    document = ft("evaluate", "--model", model, "--data", rows, "--json").json
    assert document["base"]["json_valid"] == document["base"]["json_equal"] == 0.0  # an untrained model


def test_undesirable_rows_are_scored_by_themselves(run: Path, tmp_path: Path) -> None:
    """The headline is that of the other rows alone; the figures of the rest are those of a file that holds them."""
    good = [{"prompt": f"Say {word}", "completion": word.upper(), "label": True} for word in ("red", "six")]
    bad = [{"prompt": "Say blue", "completion": "no", "label": False}]
    both = evaluate(run, data=write_rows(tmp_path / "both.jsonl", [*good, *bad]), generate=0)
    alone = evaluate(run, data=write_rows(tmp_path / "good.jsonl", good), generate=0)
    unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in bad]
    others = evaluate(run, data=write_rows(tmp_path / "bad.jsonl", unlabelled), generate=0)
    assert both.tuned is not None
    assert alone.tuned is not None
    assert others.tuned is not None
    assert both.tuned.loss == pytest.approx(alone.tuned.loss, rel=1e-6)
    assert alone.tuned.undesirable is None
    assert both.tuned.undesirable is not None
    assert both.tuned.undesirable.rows == 1
    assert both.tuned.undesirable.loss == pytest.approx(others.tuned.loss, rel=1e-6)
    assert "undesirable rows (1)" in ft("evaluate", run, "--data", tmp_path / "both.jsonl", "--generate", 0).out


def test_the_base_alone_is_measured_where_nothing_was_tuned(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    ran = ft("evaluate", "--model", model, "--data", rows, "--generate", 0, "--json")
    assert "tuned" not in ran.json
    assert ran.json["rows"] == 8


def test_rows_that_changed_since_the_run_are_refused(model: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("RED", "ROT"))
    with pytest.raises(DataError, match="cannot be made again, because a data file changed"):
        evaluate(run)


def test_plain_text_is_continued_and_not_judged(model: Path, tmp_path: Path) -> None:
    texts = [{"text": f"The story of number {number} is short."} for number in range(9)]
    run = tiny_run(tmp_path, model, rows=texts)
    result = evaluate(run)
    assert result.base.exact_match is None
    assert result.template == "plain"
    ran = ft("generate", "--model", run, "--prompt", "The story", "--max-tokens", 2, "--json")
    assert (ran.json["rendered_prompt"], ran.json["template"]) == ("The story", None)


def test_wrong_requests_say_what_is_wrong(run: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    other = write_tiny_adapter(tmp_path / "other", layers=3)
    wrong: list[tuple[list[object], int, str]] = [
        ([tmp_path], 2, "is not a run"),
        ([run, "--checkpoint", 4], 1, "There are: best, last, 3, 6"),
        ([run, "--limit", 0], 2, "--limit 0"),
        ([run, "--generate", -1], 2, "--generate -1"),
        ([run, "--output", "figures.txt"], 2, ".json"),
        ([run, "--output", tmp_path / "none" / "results.json"], 2, "does not exist"),
        (["--model", model], 2, "no rows to evaluate on"),
        ([run, "--data", tmp_path / "empty.jsonl"], 1, "empty.jsonl"),
        ([run, "--data", tmp_path / "none.jsonl"], 1, "none.jsonl"),
        (["--model", model, "--adapter", other, "--data", run.parent / "rows.jsonl"], 1, "layers.2"),
    ]
    for arguments, code, message in wrong:
        ran = ft("evaluate", *arguments)
        assert (ran.code, message in ran.err) == (code, True), (arguments, ran)


@pytest.mark.parametrize("format", ["peft", "mlx", "merged"])
def test_a_run_is_exported_with_its_figures(run: Path, tmp_path: Path, format: str) -> None:
    ran = ft("export", run, "--format", format, "--output", tmp_path / "out", "--json")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ran.code == 0
    assert ran.json["comparison"]["largest_difference"] < 1e-4
    assert all(words in card for words in ["## Data", "rows trained", "perplexity", "- rank: 4"])


def test_a_full_run_is_exported_as_a_model_and_nothing_else(full_run: Path, tmp_path: Path) -> None:
    done = ft("export", full_run, "--format", "merged", "--output", tmp_path / "out", "--json")
    assert done.json["comparison"]["largest_difference"] == 0.0
    assert done.json["comparison"]["adapter_effect"] > 0.1
    refused = ft("export", full_run, "--format", "peft", "--output", tmp_path / "no")
    assert (refused.code, "no adapter" in refused.err, (tmp_path / "no").exists()) == (2, True, False)
    answer = ft("generate", "--model", full_run, "--prompt", "Say red", "--max-tokens", 4, "--json").json
    exported = ft("generate", "--model", tmp_path / "out", "--prompt", "Say red", "--max-tokens", 4, "--json").json
    assert answer["text"] == exported["text"]


def test_the_template_travels_with_an_adapter(model: Path, tmp_path: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare", chat_template=None)
    run = tiny_run(tmp_path / "work", bare)
    moved = (run / "adapter").rename(tmp_path / "moved")
    inside = ft(
        "generate", "--model", bare, "--adapter", moved, "--prompt", "Say red", "--max-tokens", 1, "--json"
    ).json
    assert inside["rendered_prompt"] != "Say red"
    assert ft("export", moved, "--format", "peft", "--output", tmp_path / "out").code == 0
    carried, exported = (path / "chat_template.jinja" for path in (moved, tmp_path / "out"))
    assert exported.read_text().strip() == carried.read_text().strip()

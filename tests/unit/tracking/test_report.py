"""report.json and report.html."""

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from finetune.core.types import ParameterCount
from finetune.data.report import RowCounts
from finetune.tracking.metrics_log import to_text
from finetune.tracking.page import render_page, samples_of
from finetune.tracking.plots import MOST_POINTS, smoothed, thinned
from finetune.tracking.report import RunFacts, make_report
from finetune.training.state import TrainingState

FACTS = RunFacts(
    engine="mlx",
    method="lora",
    model="models/tiny",
    run_dir="outputs/run",
    steps_per_epoch=8,
    parameters=ParameterCount(10, 1000),
    rows=RowCounts(read=100, trained=80, validation=10, dropped=1, truncated=2, duplicates=3, undesirable=6),
    validation_rows=10,
    memory={"predicted_bytes": 1_400_000_000, "observed_bytes": 1_500_000_000},
)
STATE = TrainingState(
    step=20,
    tokens_processed=5000,
    tokens_trained=2000,
    step_seconds=2.0,
    elapsed_seconds=3.0,
    peak_memory_bytes=1_500_000_000,
    last_loss=1.2,
    evaluated_step=20,
    initial_eval_loss=3.0,
    final_eval_loss=1.1,
    best_eval_loss=1.0,
    best_accuracy=0.5,
    best_step=15,
)
RESULT = {"path": "outputs/run/adapter", "step": 15, "chosen": "best"}
EVIL = '<script>alert("1")</script>'


def report(state: TrainingState = STATE) -> dict[str, Any]:
    return make_report(state, FACTS, reason="completed", result=RESULT)


def test_the_report_has_the_keys_that_scripts_rely_on():
    promised = {
        "engine",
        "method",
        "steps",
        "epochs",
        "tokens_processed",
        "tokens_trained",
        "tokens_per_second",
        "initial_eval_loss",
        "best_eval_loss",
        "final_loss",
        "perplexity",
        "training_time_seconds",
        "peak_memory_gb",
        "parameters",
        "rows",
    }

    found = report()
    assert promised <= set(found)
    assert set(found["parameters"]) == {"trainable", "total"}
    assert {"read", "trained", "dropped", "truncated", "duplicates", "undesirable"} <= set(found["rows"])


def test_its_figures_follow_from_the_state():
    found = report()

    assert (found["steps"], found["epochs"], found["final_loss"]) == (20, 2.5, 1.2)
    assert found["tokens_per_second"] == 2500.0
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["peak_memory_gb"] == 1.5
    assert found["memory"] == {"predicted_bytes": 1_400_000_000, "observed_bytes": 1_500_000_000}


def test_without_an_evaluation_perplexity_is_of_the_training_loss():
    found = report(TrainingState(step=8, last_loss=2.0))

    assert found["initial_eval_loss"] is None
    assert found["perplexity"] == pytest.approx(math.exp(2.0))
    assert found["tokens_per_second"] == 0.0


def test_a_loss_that_overflows_is_still_json():
    text = to_text(report(TrainingState(step=1, last_loss=1e6)))

    assert json.loads(text)["perplexity"] is None


def events(steps: int = 30) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"event": "notice", "level": "warning", "message": EVIL}]
    for step in range(steps + 1):
        figures = {"learning_rate": 1e-4, "tokens_per_second": 100.0 + step, "memory_gb": 0.5}
        if step:
            found.append({"event": "step", "step": step, "loss": 3.0 / step, **figures})
        if step % 10 == 0:
            found.append({"event": "eval", "step": step, "loss": 2.0, "perplexity": 7.4, "accuracy": 0.5})
            answer = {"prompt": EVIL, "expected": "4", "output": f"answer {step}"}
            found.append({"event": "sample", "step": step, **answer})
    return found


def page(records: list[dict[str, Any]] | None = None, *, of: dict[str, Any] | None = None) -> str:
    info = {"data": {"files": [{"path": "rows & more.jsonl", "rows": 100, "sha256": "ab" * 32}]}}
    return render_page(
        of or report(), events=events() if records is None else records, config_text=f"x: {EVIL}", run_info=info
    )


class Reader(HTMLParser):
    """Collects tags, addresses and text, and checks that every tag that opens is closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_the_page_is_whole_and_needs_nothing_from_elsewhere():
    reader = read(page())

    assert reader.open == []
    assert reader.tags.count("figure") == 4
    assert reader.tags.count("svg") == 4
    assert all(address.startswith("#") for address in reader.addresses)
    assert "//" not in re.sub(r"<!DOCTYPE[^>]*>", "", page()).replace("</", "")
    assert len(set(reader.ids)) == len(reader.ids)


def test_nothing_from_the_data_becomes_markup():
    text = page()

    assert "script" not in read(text).tags
    assert text.count("&lt;script&gt;") >= 3  # notice, prompt, configuration


def test_the_page_is_the_same_each_time():
    assert page() == page()


def test_colours_are_the_pages_own_so_that_a_dark_screen_works():
    text = page()

    assert "var(--accent)" in text
    assert not re.search(r"(?:stroke|fill): #0[1-5]", text)
    assert "prefers-color-scheme: dark" in text


def test_the_last_answer_stands_beside_the_first():
    sample = samples_of(events())[0]

    assert (sample.before, sample.after) == ("answer 0", "answer 30")


def test_a_run_without_evaluation_or_step_has_a_page_too():
    bare = report(TrainingState())
    assert "Evaluation loss" not in page([], of=bare)
    assert "svg" not in read(page([], of=bare)).tags


def test_a_long_curve_is_thinned_without_moving_its_mean():
    points = [(float(step), float(step % 7)) for step in range(10_000)]
    steps, values = thinned(points)

    assert len(steps) <= MOST_POINTS
    assert sum(values) / len(values) == pytest.approx(sum(value for _, value in points) / len(points), rel=1e-3)


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smoothed([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert smoothed([4.0])[0] == pytest.approx(4.0)

"""`report.html`: the whole run on one page that opens from disk, with no network and no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from finetune.tracking.lines import duration, finish_words
from finetune.tracking.plots import make_plots


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its answers: before the first step, and at the last evaluation."""

    prompt: str
    expected: str
    before: str | None
    after: str

    @property
    def is_right(self) -> bool:
        """Whether the last answer is the expected one; white space around them does not count."""
        return self.after.strip() == self.expected.strip()


@dataclass(frozen=True, slots=True)
class Figure:
    """A number on top of the page, with what it means."""

    label: str
    value: str
    note: str = ""


def render_page(
    report: Mapping[str, Any],
    *,
    events: Sequence[Mapping[str, Any]],
    config_text: str,
    run_info: Mapping[str, Any],
) -> str:
    """The page as text: HTML that is complete in itself, everything from outside escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("finetune.tracking"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.jinja")
    return template.render(
        title=PurePath(str(report["model"])).name,
        report=report,
        figures=figures_of(report),
        plots=make_plots(events),
        samples=samples_of(events),
        files=run_info["data"]["files"],
        notices=[event for event in events if event["event"] == "notice"],
        ended=finish_words(str(report["finish_reason"])),
        time=duration(float(report["training_time_seconds"])),
        config_text=config_text,
        run_info=run_info,
    )


def figures_of(report: Mapping[str, Any]) -> list[Figure]:
    """What a person looks for first."""
    figures = []
    before, after = report["initial_eval_loss"], report["best_eval_loss"]
    if before is not None and after is not None:
        figures.append(Figure("Evaluation loss", f"{after:.4f}", f"before {before:.4f} ({after / before - 1:+.0%})"))
    if report["perplexity"] is not None:
        figures.append(Figure("Perplexity", f"{report['perplexity']:,.2f}"))
    if report["accuracy"] is not None:
        figures.append(Figure("Token accuracy", f"{report['accuracy']:.1%}", "next tokens predicted exactly"))
    if report["final_loss"] is not None:
        figures.append(Figure("Training loss", f"{report['final_loss']:.4f}", "of the last step"))
    parameters = report["parameters"]
    share = parameters["trainable"] / max(1, parameters["total"])
    return [
        *figures,
        Figure("Speed", f"{report['tokens_per_second']:,.0f} tok/s", "real tokens, no padding"),
        Figure("Peak memory", f"{report['peak_memory_gb']:.2f} GB", _predicted(report["memory"]["predicted_bytes"])),
        Figure("Time", duration(float(report["training_time_seconds"])), f"{report['steps']:,} steps"),
        Figure("Trained parameters", f"{parameters['trainable']:,}", f"{share:.2%} of {parameters['total']:,}"),
    ]


def _predicted(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB were predicted"


def samples_of(events: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The answers of the last evaluation, each beside the one from before the first step."""
    answers = [event for event in events if event["event"] == "sample"]
    if not answers:
        return []
    last = max(event["step"] for event in answers)
    before = {event["prompt"]: event["output"] for event in answers if event["step"] == 0 and last > 0}
    return [
        Sample(event["prompt"], event["expected"], before.get(event["prompt"]), event["output"])
        for event in answers
        if event["step"] == last
    ]

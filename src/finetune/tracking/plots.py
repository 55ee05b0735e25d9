"""Curves as SVG that stands inside a page: colours are the page's own, text is text, bytes are the same each time."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MOST_POINTS = 500
# Colours that matplotlib writes and the page replaces: it has others for a dark screen.
INK, MUTED, LINE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", SECOND: "--second"}


@dataclass(frozen=True, slots=True)
class Curve:
    """Values at steps. `faint` curves are the noise behind a smooth one; `marked` ones show each point."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str = ACCENT
    faint: bool = False
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled figure, with the sentence that a screen reader says."""

    title: str
    unit: str
    svg: str
    summary: str


def make_plots(events: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    """Loss, learning rate, tokens/s and memory over the steps; nothing where no step was applied."""
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "eval"]
    if not steps:
        return ()
    losses = _with_average("training, smoothed", steps, "loss")
    if evaluations:
        losses.append(_curve("evaluation", evaluations, "loss", colour=SECOND, marked=True))
    speed = _with_average("tokens/s, smoothed", steps, "tokens_per_second")
    return (
        _plot("Loss", "nats per trained token", losses),
        _plot("Learning rate", "", [_curve("learning rate", steps, "learning_rate")]),
        _plot("Speed", "tokens per second", speed, from_zero=True),
        _plot("Memory", "GB, peak", [_curve("memory", steps, "memory_gb")], from_zero=True),
    )


def _with_average(label: str, records: Sequence[Mapping[str, Any]], key: str) -> list[Curve]:
    """The values as they are, faint, and their average in front."""
    raw = _curve(label, records, key)
    return [replace(raw, faint=True), replace(raw, values=smoothed(raw.values))]


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Exponential average without a bias to its first value (as Adam corrects its moments)."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = (1 - share) * average + share * value
        weight = (1 - share) * weight + share
        result.append(average / weight)
    return result


def _curve(
    label: str, records: Sequence[Mapping[str, Any]], key: str, *, colour: str = ACCENT, marked: bool = False
) -> Curve:
    points = [(float(record["step"]), float(record[key])) for record in records if record[key] is not None]
    steps, values = thinned(points)
    return Curve(label, steps, values, colour, marked=marked)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points: neighbours are averaged."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return (
        [sum(step for step, _ in group) / len(group) for group in groups],
        [sum(value for _, value in group) / len(group) for group in groups],
    )


def _plot(title: str, unit: str, curves: Sequence[Curve], *, from_zero: bool = False) -> Plot:
    shown = [curve for curve in curves if curve.steps and not curve.faint]
    summary = "; ".join(
        f"{curve.label} from {curve.values[0]:.4g} at step {curve.steps[0]:.0f} "
        f"to {curve.values[-1]:.4g} at step {curve.steps[-1]:.0f}"
        for curve in shown
    )
    return Plot(title, unit, _draw(title, curves, from_zero=from_zero), summary)


def take_addresses() -> None:
    """Draw nothing, so that plots need few addresses later: libraries are loaded, and NumPy's OpenBLAS has its buffer.

    Where it cannot have that, it ends the process: a run whose addresses are limited draws before anything else.
    """
    _draw("nothing", (), from_zero=False)


def _draw(title: str, curves: Sequence[Curve], *, from_zero: bool) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    name = re.sub(r"\W", "-", title.lower())
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _add(axes, curve)
        _dress(axes, legend=sum(not curve.faint for curve in curves) > 1, from_zero=from_zero)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(text.getvalue(), name)


def _add(axes: Any, curve: Curve) -> None:
    axes.plot(
        curve.steps,
        curve.values,
        color=curve.colour,
        linewidth=1.0 if curve.faint else 1.8,
        alpha=0.28 if curve.faint else 1.0,
        marker="o" if curve.marked or len(curve.steps) == 1 else None,
        markersize=4,
        label=None if curve.faint else curve.label,
    )


def _dress(axes: Any, *, legend: bool, from_zero: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.set_xlabel("step", color=MUTED)
    axes.margins(x=0.01)
    if from_zero:
        axes.set_ylim(bottom=0, top=max(1e-9, axes.get_ylim()[1] * 1.08))
    if legend:
        axes.legend(frameon=False, labelcolor=INK, loc="upper right")


def _for_the_page(svg: str, name: str) -> str:
    """The `<svg>` element with the page's colours and font, a free size, and identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="presentation">', svg, count=1)
    svg = re.sub(r"""font-family: ?[^;"]+;?""", "", svg)
    svg = re.sub(r"""font: ([\d.]+px)[^;"]*""", r"font-size: \1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()

"""From results to docs/performance.md: the tables between its two marks, and the plots beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path("docs/performance.md")
PLOTS = Path("docs/performance")
BEGIN, END = "<!-- figures of the last run: begin -->", "<!-- figures of the last run: end -->"
_AXES = {
    "length": "tokens a row (2,048 tokens a step)",
    "batch": "rows a step, of 256 tokens",
    "rank": "rank",
    "rows": "rows in the file",
}
_COLOURS = {"pytorch": "#d1603d", "mlx": "#2f6690"}


def main(results: Path) -> None:
    """Write the tables and the plots of all results that are there."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    lines = list(_lines(found))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    matches = [result for result in found.values() if "match" in result]
    if matches:
        _plot_speed(matches)
    if "scaling" in found:
        _plot_scaling(found["scaling"])


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for result in found.values():
        if "match" in result:
            yield from _match_table(result)
    if "scaling" in found:
        yield from _scaling_table(found["scaling"])


def _match_table(result: Mapping[str, Any]) -> Iterator[str]:
    ours, *peers = result["sides"]
    yield f"### {result['match']}: {result['rounds']} round(s) of {ours['steps']} steps"
    yield ""
    yield "| | tokens/s, median | each round | peak memory | final loss | speed of ours | memory of ours |"
    yield "|---|---|---|---|---|---|---|"
    for side in (ours, *peers):
        ratio = result["ratios"].get(side["side"])
        ratios = ["", ""] if ratio is None else [f"{ratio['speed']:.2f} x", f"{ratio['memory']:.2f} x"]
        each = ", ".join(f"{rate:.0f}" for rate in side["tokens_per_second"])
        rate = f"{side['median_tokens_per_second']:.0f}"
        cells = [side["side"], rate, each, f"{side['peak_gb']:.2f} GB", f"{side['final_loss']:.4f}", *ratios]
        yield f"| {' | '.join(cells)} |"
    machine = result["machine"]
    yield ""
    yield f"{result['date']}, {machine['processor']}, {machine['cores']} cores, {machine['memory']}; " + ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "mlx", "mlx-lm", "transformers", "trl", "peft")
    )
    yield ""


def _scaling_table(result: Mapping[str, Any]) -> Iterator[str]:
    yield "### Cost as work grows (nano30, LoRA)"
    yield ""
    yield "| | | pytorch: s a step | peak | optimizer state | mlx: s a step | peak | optimizer state |"
    yield "|---|---|---|---|---|---|---|---|"
    for axis, label in _AXES.items():
        for number, (torch_point, mlx_point) in enumerate(
            zip(result["pytorch"][axis], result["mlx"][axis], strict=True)
        ):
            cells = ["" if number else label, f"{torch_point['value']:,}"]
            for point in (torch_point, mlx_point):
                cells += [f"{point['seconds']:.2f}", f"{point['peak_gb']:.2f} GB", f"{point['state_mb']:.1f} MB"]
            yield f"| {' | '.join(cells)} |"
    yield ""


def _plot_speed(matches: Sequence[Mapping[str, Any]]) -> None:
    """Bars of tokens/s and of peak memory, a group for each match."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.8 * len(matches)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    place, ticks, labels = 0.0, [], []
    for result in matches:
        for side in result["sides"]:
            colour = _COLOURS["pytorch"] if side["side"].startswith("finetune") else "#b5b5b5"
            speed.barh(place, side["median_tokens_per_second"], color=colour)
            memory.barh(place, side["peak_gb"], color=colour)
            ticks.append(place)
            labels.append(f"{result['match']}: {side['side']}")
            place += 1
        place += 0.8
    speed.set_yticks(ticks, labels, fontsize=8)
    speed.invert_yaxis()
    for axes, title in (
        (speed, "real tokens per second (more is better)"),
        (memory, "peak memory, GB (less is better)"),
    ):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, "speed.svg")


def _plot_scaling(result: Mapping[str, Any]) -> None:
    """Time and memory against each axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(_AXES))
    for column, (axis, label) in enumerate(_AXES.items()):
        for backend, colour in _COLOURS.items():
            points = result[backend][axis]
            values = [point["value"] for point in points]
            for row, key in enumerate(("seconds", "peak_gb")):
                axes[row, column].plot(values, [p[key] for p in points], "o-", color=colour, label=backend)
        for row, name in enumerate(("seconds a step", "peak memory, GB")):
            panel = axes[row, column]
            panel.set_xscale("log", base=2 if axis != "rows" else 10)
            panel.set_ylim(bottom=0)
            panel.set_xlabel(label)
            panel.set_title(name, fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    _save(figure, "scaling.svg")


def _save(figure: Any, name: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(PLOTS / name, metadata={"Date": None})

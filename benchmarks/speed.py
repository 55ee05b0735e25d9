"""Speed and memory against the peers: rounds of one run of each side in turn, then medians and ratios."""

import json
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.measuring import Run
from benchmarks.sides import MATCHES, Match, prepare_rows, run, summary


def measure(match: Match, workload: Path, *, rounds: int, steps: int) -> dict[str, Any]:
    """All sides of one match, `rounds` times in turn."""
    rows = prepare_rows(workload, match, steps)
    runs: dict[str, list[Run]] = {side.name: [] for side in match.sides}
    for number in range(rounds):
        for side in match.sides:
            done = run(side, match, workload, rows)
            runs[side.name].append(done)
            rate = rows.tokens / done.seconds
            print(
                f"{match.name} round {number + 1}: {side.name:20} {rate:8.1f} tokens/s  "
                f"{done.peak_bytes / 1e9:6.2f} GB  loss {done.losses[-1]:.4f}",
                flush=True,
            )
    sides = [summary(side, runs[side.name], rows.tokens) for side in match.sides]
    ours, *peers = match.sides
    ratios = {peer.name: _ratios(runs[ours.name], runs[peer.name]) for peer in peers}
    about = {"date": f"{date.today()}", "machine": describe_machine()}
    return {"match": match.name, "rounds": rounds, "sides": sides, "ratios": ratios, **about}


def _ratios(ours: list[Run], peer: list[Run]) -> dict[str, float]:
    """Of each round's pair, and the median of them: more than 1 is faster, less than 1 is leaner."""
    return {
        "speed": round(median(b.seconds / a.seconds for a, b in zip(ours, peer, strict=True)), 2),
        "memory": round(median(a.peak_bytes / b.peak_bytes for a, b in zip(ours, peer, strict=True)), 2),
        "final_loss": round(ours[-1].losses[-1] / peer[-1].losses[-1], 4),
    }


def main(workload: Path, results: Path, *, names: list[str], rounds: int, steps: int) -> None:
    """Measure the matches of these names (all where none is given), and keep each result as soon as it is there."""
    unknown = set(names) - {match.name for match in MATCHES}
    if unknown:
        known = ", ".join(match.name for match in MATCHES)
        raise SystemExit(f"There is no match {', '.join(sorted(unknown))}. Known: {known}.")
    for match in MATCHES:
        if not names or match.name in names:
            result = measure(match, workload, rounds=rounds, steps=steps)
            (results / f"{match.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            for peer, ratio in result["ratios"].items():
                print(
                    f"  {match.name} against {peer}: {ratio['speed']:.2f} x the speed, "
                    f"{ratio['memory']:.2f} x the memory, {ratio['final_loss']:.4f} x the final loss"
                )

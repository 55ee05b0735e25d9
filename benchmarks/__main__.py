"""`make bench`, or `python -m benchmarks speed|scaling|report`: measure, and write docs/performance.md's figures.

Without a word it does all three. Close other programs first: a busy machine measures its other work. All of it
takes about an hour on two cores; `--match mlx-nano30 --rounds 1` is a few minutes.
"""

import argparse
import os
from pathlib import Path

from benchmarks import report, scaling, speed
from benchmarks.workload import make_workload

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("all", "speed", "scaling", "report"), default="all")
    parser.add_argument("--workload", type=Path, default=HERE / "workload", help="where models and rows are made")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where figures are kept")
    parser.add_argument("--data", type=Path, help="JSONL of chats; default: generated ones of like lengths")
    parser.add_argument("--match", action="append", default=[], help="only this match, for example mlx-nano30")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps a run; the first two are not counted")
    arguments = parser.parse_args()
    os.chdir(HERE.parent)
    for folder in (arguments.workload, arguments.results):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.what != "report":
        make_workload(arguments.workload, arguments.data)
    if arguments.what in {"all", "speed"}:
        speed.main(
            arguments.workload,
            arguments.results,
            names=arguments.match,
            rounds=arguments.rounds,
            steps=arguments.steps,
        )
    if arguments.what in {"all", "scaling"}:
        scaling.main(arguments.workload, arguments.results)
    report.main(arguments.results)


if __name__ == "__main__":
    main()

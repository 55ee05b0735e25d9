"""Requests at once over several adapters: `ft serve` on both engines against `mlx_lm.server`, in turn.

    python -m benchmarks.serving --workload DIR --rounds 3

`mlx_lm.server` has one adapter in memory and loads the model again to change it; it and the MLX engine have the same
BLAS. All sides get the same prompts, greedy decoding and the same number of tokens; what is counted are the tokens that
came back. Then the time to the first token (`first_token.py`): of a request alone, of one that joins three others, of
four in the same moment.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import first_token
from benchmarks.first_token import FirstTokens, Kind
from benchmarks.machine import describe_machine
from benchmarks.servers import ADAPTERS, Side, body, cpu_seconds, ours, prompts_of, theirs, write_adapters
from benchmarks.workload import make_workload

HERE = Path(__file__).resolve().parent
AT_ONCE = 16
PEER = "mlx_lm.server"
TOKENS = 64  # of each answer


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens of all answers a second of wall time, from the first request on."""

    rate: float
    tokens: int
    cpu: float  # seconds of processor time of the server


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of one side."""

    four_adapters: Throughput
    one_adapter: Throughput
    first_token: dict[str, FirstTokens]  # by kind of prompt


async def throughput(side: Side, prompts: Sequence[str], adapters: Sequence[str]) -> Throughput:
    """All prompts at once, adapters in turn."""
    async with httpx.AsyncClient(base_url=side.url, timeout=600, trust_env=False) as client:

        async def one(number: int) -> int:
            adapter = adapters[number % len(adapters)]
            response = await persistently(client, body(side, adapter, prompts[number], tokens=TOKENS))
            return int(response.raise_for_status().json()["usage"]["completion_tokens"])

        cpu, began = cpu_seconds(side), time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(number) for number in range(len(prompts)))))
        seconds = time.perf_counter() - began
    return Throughput(tokens / seconds, tokens, cpu_seconds(side) - cpu)


async def persistently(client: httpx.AsyncClient, asked: dict[str, Any]) -> httpx.Response:
    """The answer, asked for again where the connection is refused: the peer lets five wait to be accepted."""
    for _ in range(20):
        try:
            return await client.post("/v1/chat/completions", json=asked)
        except httpx.TransportError:
            await asyncio.sleep(0.02)
    raise SystemExit(f"{client.base_url} refuses every connection")


def measure(side: Side, prompts: Sequence[str], kinds: Sequence[Kind], tries: int) -> Figures:
    """All figures of one side. Every set of prompts is new to the server, so that no cache answers for it."""
    batches = [prompts[start : start + AT_ONCE] for start in range(0, 3 * AT_ONCE, AT_ONCE)]
    asyncio.run(throughput(side, batches[0][:2], ADAPTERS[:1]))  # warm
    four = asyncio.run(throughput(side, batches[1], ADAPTERS))
    asyncio.run(throughput(side, batches[0][2:3], ADAPTERS[:1]))
    one = asyncio.run(throughput(side, batches[2], ADAPTERS[:1]))
    return Figures(four, one, {kind.name: first_token.measure(side, kind, tries) for kind in kinds})


def answered_kinds(model: Path, adapters: Path, texts: Sequence[str], tries: int) -> list[Kind]:
    """Prompts for the time to the first token, the same for both sides."""
    with ours("pytorch", model, adapters) as side:
        candidates = first_token.kinds_of(texts, tries)
        return [asyncio.run(first_token.answered(side, kind, tries)) for kind in candidates]


def summary(runs: dict[str, list[Figures]]) -> dict[str, Any]:
    """Medians of each side, and how they compare."""
    middle = {side: _medians([asdict(run) for run in figures]) for side, figures in runs.items()}
    their = middle[PEER]
    ratios: dict[str, dict[str, float]] = {}
    for side, our in middle.items():
        if side != PEER:
            for name in ("four_adapters", "one_adapter"):
                ratios.setdefault(side, {})[name] = round(our[name]["rate"] / their[name]["rate"], 2)
                ratios[side][f"{name}_cpu"] = round(their[name]["cpu"] / our[name]["cpu"], 2)
    return {"median": middle, "ratios": ratios}


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every number in documents of one shape."""
    return {
        key: _medians([run[key] for run in runs])
        if isinstance(value, dict)
        else round(median(run[key] for run in runs), 4)
        for key, value in runs[0].items()
    }


def main() -> None:
    """Parse the command line, measure both sides in turn, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, default=HERE / "workload", help="where models and rows are made")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where figures are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=9, help="of each time to the first token, in a round")
    arguments = parser.parse_args()
    for folder in (arguments.workload, arguments.results):
        folder.mkdir(parents=True, exist_ok=True)
    make_workload(arguments.workload, None)
    prompts = prompts_of(arguments.workload)
    model = arguments.workload / "nano30"
    runs: dict[str, list[Figures]] = {}
    load = [round(one, 2) for one in os.getloadavg()]
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(model, Path(folder))
        kinds = answered_kinds(model, Path(folder), prompts[3 * AT_ONCE :], arguments.tries)
        for number in range(arguments.rounds):
            for start in (partial(ours, "mlx"), partial(ours, "pytorch"), theirs):
                with start(model, Path(folder)) as side:
                    figures = measure(side, prompts, kinds, arguments.tries)
                runs.setdefault(side.name, []).append(figures)
                print(f"round {number + 1}, {side.name}: {json.dumps(asdict(figures))}", flush=True)
    found = summary(runs)
    listed = {side: [asdict(run) for run in figures] for side, figures in runs.items()}
    document = {"machine": describe_machine(), "load_average_before": load, **found, "runs": listed}
    (arguments.results / "serving.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""Requests at once over several adapters: `ft serve` against `mlx_lm.server`, in turn, with the same BLAS.

    python -m benchmarks.serving --workload DIR --rounds 3

`mlx_lm.server` has one adapter in memory and loads the model again to change it. Both sides get the same prompts,
greedy decoding and the same number of tokens; what is counted are the tokens that came back.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.machine import describe_machine
from benchmarks.workload import make_workload, read_rows

HERE = Path(__file__).resolve().parent
ADAPTERS = ("one", "two", "three", "four")
AT_ONCE = 16
TOKENS = 64  # of each answer
LATENCY_REQUESTS = 4
LATENCY_PROMPTS = 1 + 2 * LATENCY_REQUESTS  # one alone, some together, some of which the last one joins the others
LATENCY_TRIES = 5

# The wheel's own BLAS is about 30 times slower: the peer gets the one that this project loads.
THEIR_MAIN = "import finetune.engines.mlx; from mlx_lm.server import main; main()"


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of one side. Rates are tokens of all answers a second of wall time, from the first request on."""

    four_adapters: float
    one_adapter: float
    four_adapters_tokens: int
    one_adapter_tokens: int
    four_adapters_cpu: float  # seconds of processor time of the server
    one_adapter_cpu: float
    first_token_alone: float  # seconds, median
    first_token_joining: float  # while LATENCY_REQUESTS - 1 others decode, median
    first_token_together: float  # of LATENCY_REQUESTS that come in the same moment, median


@dataclass(frozen=True, slots=True)
class Side:
    """A running server: how a request names an adapter is all that differs."""

    name: str
    url: str
    process: psutil.Process
    adapter_fields: dict[str, dict[str, str]]


def write_adapters(model: Path, folder: Path) -> None:
    """Random LoRA of rank 8 on every linear module, as PEFT (ours) and as mlx-lm (theirs) write it."""
    import numpy as np

    from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate
    from finetune.adapters.mlx_lm import write_mlx_lm
    from finetune.adapters.peft import write_adapter

    config = json.loads((model / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    targets = tuple(sorted(name.split(".")[-1] for name in shapes))
    for seed, name in enumerate(ADAPTERS):
        rng = np.random.default_rng(seed)
        updates = {
            f"model.layers.{layer}.{module}": LoraUpdate(
                rng.normal(0, 0.02, (8, columns)).astype(np.float32), rng.normal(0, 0.02, (rows, 8)).astype(np.float32)
            )
            for layer in range(layers)
            for module, (columns, rows) in shapes.items()
        }
        adapter = Adapter(AdapterConfig(rank=8, alpha=16.0, target_modules=targets, base_model=str(model)), updates)
        write_adapter(folder / "peft" / name, adapter)
        write_mlx_lm(folder / "mlx" / name, adapter, layers=layers)


@contextmanager
def ours(model: Path, adapters: Path) -> Iterator[Side]:
    """`ft serve` with all adapters in memory."""
    named = [f"--adapter={name}={adapters / 'peft' / name}" for name in ADAPTERS]
    port = free_port()
    command = ["-m", "finetune", "serve", str(model), "--backend", "mlx", "--port", str(port), *named]
    fields = {name: {"model": name} for name in ADAPTERS}
    with started("ft serve", command, port, fields) as side:
        yield side


@contextmanager
def theirs(model: Path, adapters: Path) -> Iterator[Side]:
    """`mlx_lm.server`, which gets an adapter's path with each request."""
    port = free_port()
    command = ["-c", THEIR_MAIN, "--model", str(model), "--port", str(port), "--log-level", "ERROR"]
    fields = {name: {"model": str(model), "adapters": str(adapters / "mlx" / name)} for name in ADAPTERS}
    with started("mlx_lm.server", command, port, fields) as side:
        yield side


@contextmanager
def started(name: str, command: Sequence[str], port: int, fields: dict[str, dict[str, str]]) -> Iterator[Side]:
    """A server's process, from its first answer on."""
    source = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        try:
            side = Side(name, f"http://127.0.0.1:{port}", psutil.Process(process.pid), fields)
            wait_for(side, process)
            yield side
        except httpx.HTTPError as error:
            log.seek(0)
            raise SystemExit(f"{name} failed ({error!r}): {log.read().decode()[-3000:]}") from error
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(side: Side, process: "subprocess.Popen[bytes]") -> None:
    """Until the server lists its models."""
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{side.name} ended before it answered")
        try:
            if httpx.get(f"{side.url}/v1/models", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit(f"{side.name} does not answer")


def free_port() -> int:
    """A port that nothing has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def body(side: Side, adapter: str, prompt: str, *, tokens: int = TOKENS, stream: bool = False) -> dict[str, Any]:
    """A request that both sides understand."""
    messages = [{"role": "user", "content": prompt}]
    common = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": stream}
    return {**common, **side.adapter_fields[adapter]}


async def throughput(side: Side, prompts: Sequence[str], adapters: Sequence[str]) -> tuple[int, float, float]:
    """All prompts at once, adapters in turn: tokens, seconds, and seconds of processor time."""
    async with httpx.AsyncClient(base_url=side.url, timeout=600, trust_env=False) as client:

        async def one(number: int) -> int:
            adapter = adapters[number % len(adapters)]
            response = await persistently(client, body(side, adapter, prompts[number]))
            return int(response.raise_for_status().json()["usage"]["completion_tokens"])

        cpu, began = cpu_seconds(side), time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(number) for number in range(len(prompts)))))
        seconds = time.perf_counter() - began
    return tokens, seconds, cpu_seconds(side) - cpu


async def persistently(client: httpx.AsyncClient, asked: dict[str, Any]) -> httpx.Response:
    """The answer, asked for again where the connection is refused: the peer lets five wait to be accepted."""
    for _ in range(20):
        try:
            return await client.post("/v1/chat/completions", json=asked)
        except httpx.TransportError:
            await asyncio.sleep(0.02)
    raise SystemExit(f"{client.base_url} refuses every connection")


async def first_token(client: httpx.AsyncClient, asked: dict[str, Any], ready: asyncio.Event | None = None) -> float:
    """Seconds to the first text of an answer, which is read to its end; `ready` is set at the first text."""
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if not first and has_text(line):
                first = time.perf_counter() - began
                if ready is not None:
                    ready.set()
    if ready is not None:
        ready.set()  # an answer may be empty: random weights end one at once now and then
    return first or time.perf_counter() - began


async def first_tokens(side: Side, prompts: Sequence[str]) -> list[float]:
    """Seconds to the first text of each answer, all asked for in the same moment with one adapter."""
    async with httpx.AsyncClient(base_url=side.url, timeout=600, trust_env=False) as client:
        asked = [body(side, ADAPTERS[0], prompt, tokens=8, stream=True) for prompt in prompts]
        return list(await asyncio.gather(*(first_token(client, one) for one in asked)))


async def joining(side: Side, prompts: Sequence[str]) -> float:
    """Seconds to the first text of the last prompt's answer, while those of the others are being decoded."""
    async with httpx.AsyncClient(base_url=side.url, timeout=600, trust_env=False) as client:
        events = [asyncio.Event() for _ in prompts[:-1]]
        others = [
            asyncio.ensure_future(first_token(client, body(side, ADAPTERS[0], prompt, tokens=400, stream=True), event))
            for prompt, event in zip(prompts, events, strict=False)
        ]
        await asyncio.gather(*(event.wait() for event in events))
        seconds = await first_token(client, body(side, ADAPTERS[0], prompts[-1], tokens=8, stream=True))
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return seconds


def has_text(line: str) -> bool:
    """Whether a line of a stream carries text of the answer."""
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


def cpu_seconds(side: Side) -> float:
    """Of the server's process so far."""
    times = side.process.cpu_times()
    return float(times.user + times.system)


def measure(side: Side, prompts: Sequence[str]) -> Figures:
    """All figures of one side. Every set of prompts is new to the server, so that no cache answers for it."""
    batches = [prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE)]
    asyncio.run(throughput(side, batches[0][:2], ADAPTERS[:1]))  # warm
    many, many_seconds, many_cpu = asyncio.run(throughput(side, batches[1], ADAPTERS))
    asyncio.run(throughput(side, batches[0][2:3], ADAPTERS[:1]))
    single, single_seconds, single_cpu = asyncio.run(throughput(side, batches[2], ADAPTERS[:1]))
    rest = [prompt for batch in batches[3:] for prompt in batch]
    alone, join, together = [], [], []
    for number in range(LATENCY_TRIES):
        group = rest[number * LATENCY_PROMPTS :]
        alone += asyncio.run(first_tokens(side, group[:1]))
        together += asyncio.run(first_tokens(side, group[1 : LATENCY_REQUESTS + 1]))
        join.append(asyncio.run(joining(side, group[LATENCY_REQUESTS + 1 : LATENCY_PROMPTS])))
    return Figures(
        four_adapters=many / many_seconds,
        one_adapter=single / single_seconds,
        four_adapters_tokens=many,
        one_adapter_tokens=single,
        four_adapters_cpu=many_cpu,
        one_adapter_cpu=single_cpu,
        first_token_alone=median(alone),
        first_token_joining=median(join),
        first_token_together=median(together),
    )


def prompts_of(workload: Path, count: int) -> list[str]:
    """First requests of the workload's conversations, each different from its first word on."""
    rows = read_rows(workload / "chat.jsonl")
    texts = [next(turn["content"] for turn in row["messages"] if turn["role"] == "user") for row in rows]
    return [f"{number}. {text[:600]}" for number, text in enumerate(texts[:count])]


def summary(runs: dict[str, list[Figures]]) -> dict[str, Any]:
    """Medians of each side, and how they compare."""
    middle = {
        side: {key: round(median(asdict(run)[key] for run in figures), 4) for key in asdict(figures[0])}
        for side, figures in runs.items()
    }
    our, their = middle["ft serve"], middle["mlx_lm.server"]
    return {
        "median": middle,
        "ratio_four_adapters": round(our["four_adapters"] / their["four_adapters"], 2),
        "ratio_one_adapter": round(our["one_adapter"] / their["one_adapter"], 2),
        "ratio_four_adapters_cpu": round(their["four_adapters_cpu"] / our["four_adapters_cpu"], 2),
        "ratio_one_adapter_cpu": round(their["one_adapter_cpu"] / our["one_adapter_cpu"], 2),
        "first_token_joining_to_alone": round(our["first_token_joining"] / our["first_token_alone"], 2),
        "first_token_together_to_alone": round(our["first_token_together"] / our["first_token_alone"], 2),
    }


def main() -> None:
    """Parse the command line, measure both sides in turn, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=Path, default=HERE / "workload", help="where models and rows are made")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where figures are kept")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for folder in (arguments.workload, arguments.results):
        folder.mkdir(parents=True, exist_ok=True)
    make_workload(arguments.workload, None)
    prompts = prompts_of(arguments.workload, 3 * AT_ONCE + LATENCY_TRIES * LATENCY_PROMPTS)
    model = arguments.workload / "nano30"
    runs: dict[str, list[Figures]] = {}
    load = [round(one, 2) for one in os.getloadavg()]
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(model, Path(folder))
        for number in range(arguments.rounds):
            for start in (ours, theirs):
                with start(model, Path(folder)) as side:
                    figures = measure(side, prompts)
                runs.setdefault(side.name, []).append(figures)
                print(f"round {number + 1}, {side.name}: {asdict(figures)}", flush=True)
    found = summary(runs)
    listed = {side: [asdict(run) for run in figures] for side, figures in runs.items()}
    document = {"machine": describe_machine(), "load_average_before": load, **found, "runs": listed}
    (arguments.results / "serving.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

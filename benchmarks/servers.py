"""The two servers that are compared, their adapters, and requests that both understand."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.workload import read_rows

HERE = Path(__file__).resolve().parent
ADAPTERS = ("one", "two", "three", "four")

# The wheel's own BLAS is about 30 times slower: the peer gets the one that this project loads.
THEIR_MAIN = "import finetune.engines.mlx; from mlx_lm.server import main; main()"


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
def ours(backend: str, model: Path, adapters: Path) -> Iterator[Side]:
    """`ft serve` with all adapters in memory."""
    named = [f"--adapter={name}={adapters / 'peft' / name}" for name in ADAPTERS]
    port = free_port()
    command = ["-m", "finetune", "serve", str(model), "--backend", backend, "--port", str(port), *named]
    fields = {name: {"model": name} for name in ADAPTERS}
    with started(f"ft serve, {backend}", command, port, fields) as side:
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


def body(
    side: Side, adapter: str, prompt: str, *, tokens: int, stream: bool = False, system: str = ""
) -> dict[str, Any]:
    """A request that both sides understand."""
    head = [{"role": "system", "content": system}] if system else []
    messages = [*head, {"role": "user", "content": prompt}]
    common = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": stream}
    return {**common, **side.adapter_fields[adapter]}


def cpu_seconds(side: Side) -> float:
    """Of the server's process so far."""
    times = side.process.cpu_times()
    return float(times.user + times.system)


def prompts_of(workload: Path) -> list[str]:
    """First requests of the workload's conversations, each different from its first word on."""
    rows = read_rows(workload / "chat.jsonl")
    texts = [next(turn["content"] for turn in row["messages"] if turn["role"] == "user") for row in rows]
    return [f"{number}. {text[:600]}" for number, text in enumerate(texts)]

"""`batch_size: auto` under ten limits of memory: never out of memory, and the most of what it was given.

Usage: python benchmarks/auto_batch.py [--engine mlx|pytorch] [--cgroup] [--json FILE] [--limits MIB ...]

Each run tunes a random model of four layers on rows of a few hundred tokens, 16 a step, as `ft train` does, in a
process that may take so much more address space (RLIMIT_AS), or with --cgroup memory (cgroup v1, as root), than it has
before it plans. The figure is the peak over the limit, both without that; what is imported with a model counts. In a
control group the model is several times as large, because the process that tries a step takes a quarter of a gigabyte
beside the run, whatever the model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4096,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# MiB beyond what the process has before it plans, with one thread: each further one takes 72 MB of addresses, and 135
# more for OpenBLAS, which MLX uses. MLX takes 0.4 GB of addresses for libraries.
GIVEN = {
    ("mlx", False): (560, 580, 600, 630, 660, 700, 740, 790, 840, 900),
    ("pytorch", False): (100, 120, 140, 160, 180, 200, 230, 260, 300, 340),
    ("mlx", True): (600, 750, 900, 1050, 1200, 1400),
    ("pytorch", True): (600, 750, 900, 1050, 1200, 1400),
}
LARGER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
_V1 = Path("/sys/fs/cgroup/memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("mlx", "pytorch"), action="append")
    parser.add_argument("--limits", type=int, nargs="*", metavar="MIB")
    parser.add_argument("--cgroup", action="store_true", help="limit memory by a control group")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(json.loads(arguments.run))))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        inputs = write_inputs(Path(name), LARGER if arguments.cgroup else {})
        for engine in arguments.engine or ("mlx", "pytorch"):
            for given in arguments.limits or GIVEN[engine, arguments.cgroup]:
                request = {"engine": engine, "given": given, "cgroup": arguments.cgroup, **inputs}
                results.append(measured(request))
                print(sentence(results[-1]), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_inputs(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    """A model directory without weights and a file of rows of plain text."""
    from finetune.models.source import DEMO_DIRECTORY

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG | sizes), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((DEMO_DIRECTORY / name).read_bytes())
    draw = np.random.default_rng(0)
    words = ["river", "stone", "bright", "little", "garden", "walks", "under", "seven"]
    rows = [" ".join(draw.choice(words, size=int(size))) for size in draw.integers(40, 160, size=36)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return {"model": str(model), "data": str(data), "output": str(folder / "runs")}


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--run", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    base = {"engine": request["engine"], "given_mib": request["given"], "cgroup": request["cgroup"]}
    if request["cgroup"]:
        base["killed"] = killed(control_group(request))
        control_group(request).rmdir()
    if done.returncode:
        return base | {"failed": done.returncode, "said": done.stderr.strip()[-300:]}
    return base | dict(json.loads(done.stdout.splitlines()[-1]))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Set the limit once everything before the plan is done, tune, and say what was taken."""
    from finetune.config.load import load_config
    from finetune.tracking.plots import take_addresses
    from finetune.workflows import auto_batch, train

    take_addresses()  # as a run does that starts with a limit
    before: list[tuple[int, int]] = []
    settle = auto_batch.settle_batch

    def limited(prepared: Any, **options: Any) -> Any:
        before.append(memory())
        restrict(request, before[0])
        return settle(prepared, **options)

    vars(train)["settle_batch"] = limited
    output = f"{request['output']}-{request['engine']}-{request['given']}-{request['cgroup']}"
    flags = {
        "model.name": request["model"], "model.init": "random", "model.backend": request["engine"],
        "model.dtype": "float32", "data.train_file": request["data"],
        "training.batch_size": "auto", "training.gradient_accumulation_steps": 4,
        "training.max_steps": 2, "output.output_dir": output, "output.sample_prompts": 0,
    }  # fmt: skip
    notices: list[str] = []
    result = train.train(
        load_config(None, environ={}, flags=flags),
        listeners=[lambda event: notices.append(getattr(event, "message", ""))],
    )
    after = peak()
    number = 0 if request["cgroup"] else 1
    config = load_config(Path(output) / "config.yml", environ={}).config.training
    return {
        "taken_mib": (after[number] - before[0][number]) / MIB,
        "share": (after[number] - before[0][number]) / (request["given"] * MIB),
        "max_batch_tokens": config.max_batch_tokens,
        "recompute": config.gradient_checkpointing,
        "loss": result.final_loss,
        "said": next(notice for notice in notices if " rows a step" in notice),
    }


def restrict(request: dict[str, Any], before: tuple[int, int]) -> None:
    """No more than the given memory from here on."""
    import resource

    if not request["cgroup"]:
        resource.setrlimit(resource.RLIMIT_AS, (before[1] + request["given"] * MIB,) * 2)
        return
    group = control_group(request)
    group.mkdir()
    # Pages are charged to the group that first touches them, so the process comes with an empty account.
    (group / "memory.limit_in_bytes").write_text(str(request["given"] * MIB))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def control_group(request: dict[str, Any]) -> Path:
    """Below the one that this script was started in."""
    own = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    return _V1 / own.lstrip("/") / f"finetune-{request['engine']}-{request['given']}"


def killed(group: Path) -> int:
    """How many processes of the group the system has ended for memory."""
    lines = (line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    return int(dict(lines)["oom_kill"])


def memory() -> tuple[int, int]:
    """(resident, address space) now."""
    return _status("VmRSS:"), _status("VmSize:")


def peak() -> tuple[int, int]:
    """(resident, address space) at most."""
    return _status("VmHWM:"), _status("VmPeak:")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def sentence(result: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{result['engine']:8} {'cgroup' if result['cgroup'] else 'RLIMIT_AS':9} {result['given_mib']:6} MiB  "
    if "failed" in result:
        return f"{head}FAILED {result['failed']}: {result['said']}"
    limit = result["max_batch_tokens"] or "all"
    again = "recomputed" if result["recompute"] else "kept"
    return f"{head}took {result['taken_mib']:6.0f}  {result['share']:4.0%}  tokens at once {limit}, activations {again}"


if __name__ == "__main__":
    main()

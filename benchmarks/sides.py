"""Who runs against whom, and the rows that all sides of a round read in the same order."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import run_ours
from benchmarks.measuring import WARM_UP, Run
from benchmarks.workload import only_last_answer, read_rows, write_rows

ROWS_A_STEP = 4
LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Side:
    """One way of running the workload: a script of this folder and its options."""

    name: str
    script: str
    options: tuple[str, ...] = ()


OURS_TORCH = Side("finetune (pytorch)", "run_ours", ("--backend", "pytorch", "--dtype", "bfloat16"))
OURS_MLX = Side("finetune (mlx)", "run_ours", ("--backend", "mlx"))
TRL = Side("TRL, batch 4", "run_trl")
TRL_ONE = Side("TRL, 1 x 4", "run_trl", ("--batch", "1"))
MLX_LM = Side("mlx-lm, batch 4", "run_mlx_lm")
MLX_LM_ONE = Side("mlx-lm, 1 x 4", "run_mlx_lm", ("--batch", "1"))


@dataclass(frozen=True, slots=True)
class Match:
    """This project's side (first) and its peers, on one model, with or without prompts masked."""

    name: str
    model: str
    sides: tuple[Side, ...]
    masked: bool = False


MATCHES: tuple[Match, ...] = (
    Match("pytorch-smol135", "smol135", (OURS_TORCH, TRL, TRL_ONE)),
    Match("pytorch-nano30", "nano30", (OURS_TORCH, TRL, TRL_ONE)),
    Match("mlx-nano30", "nano30", (OURS_MLX, MLX_LM, MLX_LM_ONE)),
    Match("mlx-smol135", "smol135", (OURS_MLX, MLX_LM, MLX_LM_ONE)),
    Match("pytorch-smol135-masked", "smol135", (OURS_TORCH, TRL, TRL_ONE), masked=True),
    Match("mlx-nano30-masked", "nano30", (OURS_MLX, MLX_LM, MLX_LM_ONE), masked=True),
)


@dataclass(frozen=True, slots=True)
class Rows:
    """The files of one match. `tokens` are the real tokens of the steps that rates count."""

    ours: Path
    peers: Path  # the same rows in the order in which this project takes them
    tokens: int


def prepare_rows(workload: Path, match: Match, steps: int) -> Rows:
    """Take the first `steps` x 4 conversations, and put them for the peers into the order of our steps."""
    from finetune.config.schema import RunConfig
    from finetune.workflows.preparation import prepare

    folder = workload / f"{match.name}-{steps}"
    folder.mkdir(exist_ok=True)
    conversations = [row["messages"] for row in read_rows(workload / "chat.jsonl")[: steps * ROWS_A_STEP]]
    if match.masked:
        conversations = [only_last_answer(conversation) for conversation in conversations]
    rows = Rows(folder / "ours.jsonl", folder / "peers.jsonl", 0)
    write_rows(rows.ours, [{"messages": conversation} for conversation in conversations])
    options = [str(workload / match.model), str(rows.ours), *match.sides[0].options]
    config = RunConfig.model_validate(run_ours.settings(run_ours.parse(options), str(folder)))
    prepared = prepare(config)
    order = [[prepared.data.train[number] for number in prepared.batches.row_numbers(step)] for step in range(steps)]
    write_rows(rows.peers, [{"messages": conversations[row.origin.line - 1]} for step in order for row in step])
    return replace(rows, tokens=sum(min(len(row), LONGEST) for step in order[WARM_UP:] for row in step))


def run(side: Side, match: Match, workload: Path, rows: Rows) -> Run:
    """One run in a process of its own."""
    data = rows.ours if side.script == "run_ours" else rows.peers
    command = [sys.executable, "-m", f"benchmarks.{side.script}", str(workload / match.model), str(data), *side.options]
    if match.masked:
        command.append("--masked")
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline}


def summary(side: Side, runs: list[Run], tokens: int) -> dict[str, Any]:
    """Medians over the rounds."""
    return {
        "side": side.name,
        "tokens_per_second": [round(tokens / run.seconds, 1) for run in runs],
        "median_tokens_per_second": round(median(tokens / run.seconds for run in runs), 1),
        "peak_gb": round(median(run.peak_bytes for run in runs) / 1e9, 2),
        "final_loss": round(runs[-1].losses[-1], 4),
        "steps": len(runs[-1].losses),
        "steps_counted": len(runs[-1].losses) - WARM_UP,
    }

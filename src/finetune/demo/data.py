"""The demo's data set: rows of plain English in, one JSON tool call out.

The three files that the package carries are what `write_splits` writes. No request is in two of them, and
pre-training leaves out every request that is in one (`demo_requests`): the test rows are new to both.
"""

import json
import random
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from finetune.demo.tools import TOOLS

Row = dict[str, list[dict[str, str]]]

SEED = 20240
ROWS_PER_TOOL: Mapping[str, int] = MappingProxyType({"train": 100, "validation": 4, "test": 7})
DATA = Path(__file__).resolve().parent / "data"
MODEL = Path(__file__).resolve().parent / "model"


@cache
def demo_splits() -> Mapping[str, tuple[Row, ...]]:
    """All rows by split in OpenAI's `messages` shape, equally many for each tool, shuffled."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    splits = {}
    for name, rows_per_tool in ROWS_PER_TOOL.items():
        rows = [_new_row(rng, tool_number, seen) for tool_number in range(len(TOOLS)) for _ in range(rows_per_tool)]
        rng.shuffle(rows)
        splits[name] = tuple(rows)
    return splits


def demo_requests() -> frozenset[str]:
    """Every request of the demo's rows, of all splits."""
    return frozenset(row["messages"][0]["content"] for rows in demo_splits().values() for row in rows)


def _new_row(rng: random.Random, tool_number: int, seen: set[str]) -> Row:
    while True:
        request, call = TOOLS[tool_number].row(rng)
        if request not in seen:
            seen.add(request)
            return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": call}]}


def jsonl(rows: Iterable[Row]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_splits(directory: Path) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in demo_splits().items():
        (directory / f"{name}.jsonl").write_text(jsonl(rows), encoding="utf-8")

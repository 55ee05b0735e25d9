"""What is wrong or odd about rows: counted, named by line, and refused past a rate."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.core.errors import DataError
from finetune.data.rows import Example, Message, Problem

_SHOWN = 5


def check_error_rate(file: str, problems: Sequence[Problem], rows: int, max_error_rate: float) -> None:
    """Raise DataError where more than the allowed share of a file's rows cannot be used."""
    if not problems or (len(problems) <= max_error_rate * rows and len(problems) < rows):
        return
    first = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    raise DataError(
        f"{file}: {len(problems):,} of {rows:,} rows cannot be used ({len(problems) / rows:.1%}); "
        f"data.max_error_rate allows {max_error_rate:.0%}. Correct them, or raise the rate to drop them:\n{first}{more}"
    )


def row_key(example: Example) -> bytes:
    """SHA-256, equal for exact duplicates: the same conversation or text, tools and label."""
    messages = [(m.role, m.content, m.tool_calls, m.name, m.tool_call_id) for m in example.messages]
    return _digest([example.text, messages, example.tools, example.fields, example.desirable])


def prompt_key(example: Example) -> bytes:
    """SHA-256, equal for rows with the same request: all in front of the first answer, or the whole of a text."""
    if example.text is not None:
        return _digest(example.text)
    return _digest([(message.role, message.content.strip()) for message in opening(example)])


def opening(example: Example) -> list[Message]:
    """The messages in front of the first answer."""
    return list(takewhile(lambda message: message.role != "assistant", example.messages))


def _digest(content: Any) -> bytes:
    return hashlib.sha256(
        json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    ).digest()


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """How long rows are, in tokens or characters. `histogram` pairs an upper bound with a number of rows."""

    shortest: int
    median: int
    p95: int
    p99: int
    longest: int
    total: int
    histogram: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(rows for _, rows in self.histogram)

    @property
    def recommended(self) -> int:
        """A limit that cuts next to nothing: the longest row, or the 99th percentile where a few are far longer."""
        covering = -(-self.p99 // 32) * 32
        return self.longest if self.longest <= 1.5 * covering else covering


class LengthCounts:
    """How many rows have each length: what a summary of any number of rows needs."""

    def __init__(self) -> None:
        self._rows = Counter[int]()

    def add(self, lengths: npt.NDArray[Any]) -> None:
        """Count some more rows."""
        for length, rows in zip(*np.unique(lengths, return_counts=True), strict=True):
            self._rows[int(length)] += int(rows)

    def beyond(self, limit: int) -> int:
        """How many rows are longer."""
        return sum(rows for length, rows in self._rows.items() if length > limit)

    def summary(self) -> LengthSummary | None:
        """Percentiles are lengths that occur; the histogram's bounds are powers of two. None for no rows."""
        if not self._rows:
            return None
        lengths = sorted(self._rows)
        up_to = np.cumsum([self._rows[length] for length in lengths])
        ranks = [math.ceil((int(up_to[-1]) - 1) * (share / 100)) for share in (50, 95, 99)]
        p50, p95, p99 = (lengths[int(np.searchsorted(up_to, rank, side="right"))] for rank in ranks)
        bins = Counter[int]()
        for length in lengths:
            bins[max(16, 1 << max(0, length - 1).bit_length())] += self._rows[length]
        total = sum(length * rows for length, rows in self._rows.items())
        return LengthSummary(lengths[0], p50, p95, p99, lengths[-1], total, tuple(sorted(bins.items())))

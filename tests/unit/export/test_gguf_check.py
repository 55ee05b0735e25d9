"""The comparison of a GGUF file with its model: over the tokens that llama.cpp names, the rest as one outcome."""

from collections.abc import Iterable

import numpy as np
import pytest

from finetune.export.gguf.check import GELU_TOLERANCE, Position, allowed, compare_running
from finetune.export.gguf.quantize import SCHEMES
from finetune.export.verify import TOLERANCES


class FakeServer:
    """Says given probabilities; only of the `named` likeliest tokens."""

    def __init__(self, rows: np.ndarray, named: int) -> None:
        self._rows, self._named = iter(rows), named

    def next_logprobs(self, ids: Iterable[int], vocabulary: int, *, top: int | None = None) -> np.ndarray:
        row = np.log(next(self._rows))
        row[np.argsort(row)[: vocabulary - self._named]] = -np.inf
        return row.astype(np.float32)


TUNED = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
BASE = np.array([[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]])
FILE = np.array([[0.4, 0.4, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
PLACES = [Position(np.array([1], np.int32), 1), Position(np.array([1, 2], np.int32), 0)]


def compared(named: int):
    return compare_running(
        FakeServer(FILE, named),  # type: ignore[arg-type]
        PLACES,
        original=np.log(TUNED).astype(np.float32),
        base=np.log(BASE).astype(np.float32),
        tolerance=1e-4,
        reason="a test",
    )


def test_differences_are_those_of_the_targets_and_divergences_of_whole_rows() -> None:
    found = compared(named=4)
    assert found.largest_difference == pytest.approx(np.log(0.4 / 0.3), abs=1e-6)
    assert found.adapter_effect == pytest.approx(np.log(0.25 / 0.1), abs=1e-6)
    assert found.divergence.exported == pytest.approx((TUNED * np.log(TUNED / FILE)).sum() / 2, abs=1e-6)
    assert found.divergence.base == pytest.approx((TUNED * np.log(TUNED / BASE)).sum() / 2, abs=1e-6)
    assert not found.holds


def test_tokens_that_are_not_named_count_as_one_outcome() -> None:
    found = compared(named=2)
    first = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    expected = sum(p * np.log(p / q) for p, q in zip(*first, strict=True)) / 2
    assert found.divergence.exported == pytest.approx(expected, abs=1e-6)
    # The second target has the smallest probability of its row, and is not named.
    assert found.largest_difference == pytest.approx(np.log(0.4 / 0.3), abs=1e-6)


def test_float_files_are_judged_and_quantised_ones_only_told() -> None:
    assert allowed(SCHEMES["f32"], ["float32"], gelu=False)[0] == TOLERANCES["float32"]
    assert allowed(SCHEMES["f32"], ["float32"], gelu=True)[0] == GELU_TOLERANCE
    assert allowed(SCHEMES["f32"], ["bfloat16"], gelu=False)[0] == TOLERANCES["bfloat16"]
    assert allowed(SCHEMES["f16"], ["float32"], gelu=True)[0] == TOLERANCES["float16"]
    assert allowed(SCHEMES["q8_0"], ["float32"], gelu=False)[0] is None

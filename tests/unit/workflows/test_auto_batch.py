"""How `batch_size: auto` searches, on a made-up machine where each cut takes what it is told to take."""

from typing import Any, cast

import pytest

from finetune.core.errors import TrainingError
from finetune.planning.cuts import Cut
from finetune.workflows import auto_batch
from finetune.workflows.auto_batch import _Room, _Search

MIB = 2**20
# Tokens at once, whether activations are recomputed, cost in tokens, predicted MiB.
CUTS = [
    Cut(tokens, recompute, cost, needed * MIB)
    for tokens, recompute, cost, needed in (
        (2141, False, 4409.0, 961), (1427, False, 4473.0, 733), (1071, False, 4537.0, 600), (857, False, 4601.0, 542),
        (612, False, 4729.0, 489), (429, False, 4921.0, 417), (367, False, 5049.0, 395), (2141, True, 5879.0, 356),
        (1071, True, 6049.0, 287), (714, True, 6220.0, 271), (367, True, 6732.0, 246),
    )
]  # fmt: skip
LIMITS = [400, 450, 500, 600, 700, 800, 900, 1000, 1200, 1500]
BESIDE = 255 * MIB  # of another process with the libraries


class Machine(_Search):
    """Steps take more than predicted, by bytes and by a part; the process that tries one needs room as well."""

    true_off = 0
    true_times = 1.0
    tries = 0

    def _cuts(self) -> list[Cut]:
        return CUTS

    def _took(self, cut: Cut) -> int | None:
        self.tries += 1
        took = self.taken(cut)
        self._exceeded(cut, min(took, self.room.beside_this))
        if took > self.room.beside_this:
            return None
        self.off = took - cut.needed
        return took if took <= auto_batch._PROVEN * self.room.free else None

    def taken(self, cut: Cut) -> int:
        return int(cut.needed * self.true_times) + self.true_off


def machine(limit: int, off: int, monkeypatch: pytest.MonkeyPatch, *, shared: bool = True) -> Machine:
    free = limit * MIB
    monkeypatch.setattr(auto_batch, "unused_memory", lambda: free if shared else 10**12)
    search = Machine(cast(Any, None), _Room(free, None, BESIDE), ())
    search.true_off = off * MIB
    return search


@pytest.mark.parametrize("shared", [True, False], ids=["memory", "addresses"])
@pytest.mark.parametrize(("off", "times"), [(-60, 1.0), (0, 1.0), (60, 1.0), (100, 1.0), (0, 1.2), (0, 1.5)])
@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_chosen_fits_and_nothing_clearly_faster_would_have_fitted_easily(
    limit: int, off: int, times: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = machine(limit, off, monkeypatch, shared=shared)
    search.true_times = times
    try:
        cut, why = search.proven()
    except TrainingError:
        no_room = min(search.taken(cut) for cut in CUTS) + (BESIDE if shared else 0)
        assert no_room > 0.85 * limit * MIB
        return
    assert search.taken(cut) <= 0.95 * limit * MIB, why
    faster = [other for other in CUTS if other.cost < 0.97 * cut.cost]
    assert all(search.taken(other) > 0.7 * limit * MIB for other in faster), why
    assert search.tries <= 6


def test_a_step_for_which_there_is_no_room_beside_the_run_is_known_by_a_smaller_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut, why = machine(600, 60, monkeypatch).proven()
    assert not cut.recompute
    assert why == "a step takes 0.53 GB of 0.63 GB that are free, by what a smaller one took"


def test_a_fault_that_is_not_of_memory_ends_the_search_with_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    search = machine(1200, 0, monkeypatch)

    def took(cut: Cut) -> None:
        Machine.tries += 1
        search.fault, search.ended = True, "ImportError: no module"

    monkeypatch.setattr(Machine, "_took", lambda self, cut: took(cut))
    cut, why = search.proven()
    assert (cut, Machine.tries) == (CUTS[0], 1)
    assert why.endswith("not tried, because the process that should failed (ImportError: no module)")

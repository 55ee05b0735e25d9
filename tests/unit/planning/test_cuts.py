"""How steps can be cut, and which cut is taken first."""

from itertools import pairwise

import pytest

from finetune.config.schema import TrainingConfig
from finetune.planning.cuts import Cut, cuts_of

AUTO = TrainingConfig(batch_size="auto", gradient_accumulation_steps=4)
TOKENS, LONGEST = 8_000, 900


def cuts(training: TrainingConfig = AUTO, *, enough: int | None = None) -> list[Cut]:
    def needed(settled: TrainingConfig) -> int:
        return (settled.max_batch_tokens or TOKENS) * (1 if settled.gradient_checkpointing else 3)

    return cuts_of(training, tokens=TOKENS, shortest_limit=LONGEST, needed=needed, enough=enough)


def test_rows_of_a_step_are_the_same_in_every_cut() -> None:
    assert {cut.applied(AUTO).rows_per_step for cut in cuts()} == {AUTO.rows_per_step} == {16}


def test_the_whole_step_at_once_is_the_fastest_and_recomputing_in_pieces_the_last() -> None:
    found = cuts()
    assert (found[0].max_tokens, found[0].recompute) == (None, False)
    assert (found[-1].max_tokens, found[-1].recompute) == (LONGEST, True)
    assert all(one.cost <= other.cost for one, other in pairwise(found))


@pytest.mark.parametrize(("enough", "expected"), [(2_000, 2_000), (1_500, 1_600), (100, LONGEST), (9_000, None)])
def test_where_more_tokens_are_no_faster_the_smallest_of_the_fastest_comes_first(
    enough: int, expected: int | None
) -> None:
    found = cuts(enough=enough)
    assert (found[0].max_tokens, found[0].recompute) == (expected, False)
    assert all(cut.cost >= found[0].cost for cut in found)


def test_a_cut_into_pieces_costs_less_than_to_recompute() -> None:
    kept = [cut for cut in cuts() if not cut.recompute]
    assert max(cut.cost for cut in kept) < min(cut.cost for cut in cuts() if cut.recompute)
    assert min(cut.needed for cut in kept) < max(cut.needed for cut in kept) / 5


def test_no_limit_is_below_the_longest_row() -> None:
    assert min(cut.max_tokens or TOKENS for cut in cuts()) == LONGEST


@pytest.mark.parametrize("recompute", [True, False])
def test_what_was_asked_for_is_kept(recompute: bool) -> None:
    asked = AUTO.model_copy(update={"max_batch_tokens": 2_000, "gradient_checkpointing": recompute})
    assert all(cut.max_tokens is not None and cut.max_tokens <= 2_000 for cut in cuts(asked))
    assert all(cut.recompute for cut in cuts(asked)) is recompute

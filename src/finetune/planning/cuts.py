"""How a step of given rows can be cut into micro-batches, and what each cut costs: the choices of `batch_size: auto`.

The rows of a step never depend on memory; only how many of them are in memory together does. Loss and gradients are
sums over trained tokens, so that every cut gives the same step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.config.schema import TrainingConfig

# What `Cut.applied` decides.
SETTLED = ("batch_size", "gradient_accumulation_steps", "max_batch_tokens", "gradient_checkpointing")
_CUT_COST = 64  # what a micro-batch costs besides its tokens, in tokens
_RECOMPUTED = 4 / 3  # work with a second forward pass, of work without
_MOST_CUTS = 24


@dataclass(frozen=True, slots=True)
class Cut:
    """One way of computing a step."""

    max_tokens: int | None  # of a micro-batch; None: the step is not cut
    recompute: bool
    cost: float  # in tokens computed
    needed: int = 0  # predicted bytes; 0: not known

    def applied(self, training: TrainingConfig) -> TrainingConfig:
        """The configuration that computes steps like this, with the same rows each."""
        return training.model_copy(
            update={
                "batch_size": training.rows_per_step,
                "gradient_accumulation_steps": 1,
                "max_batch_tokens": self.max_tokens,
                "gradient_checkpointing": self.recompute,
            }
        )


def cuts_of(
    training: TrainingConfig,
    *,
    tokens: int,
    shortest_limit: int,
    needed: Callable[[TrainingConfig], int],
    enough: int | None = None,
) -> list[Cut]:
    """The possible cuts, the fastest first, and of those that are alike the smallest.

    `tokens` are those of the largest step, `shortest_limit` the least that a micro-batch must hold: the longest row.
    `needed` predicts bytes. Micro-batches of more than `enough` tokens are no faster (None: the larger the faster).
    What the configuration asks for is kept: recomputation, and a limit of tokens.
    """
    fewest = 1 if enough is None else max(1, tokens // enough)
    found = []
    for recompute in (True,) if training.gradient_checkpointing else (False, True):
        for limit in _limits(tokens, shortest_limit, training.max_batch_tokens):
            pieces = max(fewest, 1 if limit is None else -(-tokens // limit))
            cost = (tokens + _CUT_COST * pieces) * (_RECOMPUTED if recompute else 1.0)
            cut = Cut(limit, recompute, cost)
            found.append(Cut(limit, recompute, cost, needed(cut.applied(training))))
    return sorted(found, key=lambda cut: (cut.cost, cut.max_tokens or tokens))


def _limits(tokens: int, shortest: int, given: int | None) -> Sequence[int | None]:
    """Limits that cut the largest step into 1, 2, 3 ... about equal pieces, none below the longest row."""
    if tokens <= (given or tokens):
        first: list[int | None] = [given]
    else:
        first = [max(shortest, given or 0)]
    most = min(given or tokens, tokens)
    pieces = 2
    limits: list[int] = []
    while len(limits) < _MOST_CUTS:
        limit = max(shortest, -(-tokens // pieces))
        if limit < most and limit not in limits:
            limits.append(limit)
        if limit == shortest:
            break
        pieces += max(1, pieces // 4)
    return [*first, *limits]

"""`training.batch_size: auto`: choose how steps are cut, confirm it with a step in another process, say so."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune.config.schema import TrainingConfig
from finetune.core.errors import TrainingError
from finetune.core.machine import free_addresses
from finetune.core.types import Batch, IntArray
from finetune.planning.cuts import Cut, cuts_of
from finetune.planning.probe import ProbedRun, Taken, probe
from finetune.planning.steps import heaviest_step
from finetune.workflows.memory import memory_plan, needed_memory
from finetune.workflows.preparation import Preparation, batch_plan

_PLANNED = 0.95  # of free memory that a prediction may take before it is tried
_PROVEN = 0.93  # of free memory that a tried step may take: evaluation, checkpoints and data need some besides
_WORTH_ANOTHER = 0.97  # of the cost of a proven cut, what a faster one may cost to be worth a try

OnNotice = Callable[[str], None]


def settle_batch(prepared: Preparation, *, tries: bool, say: OnNotice) -> Preparation:
    """The preparation with `batch_size: auto` worked out; as it is where the configuration gives a number.

    `tries` confirms the choice by a step. Raises TrainingError where nothing fits.
    """
    if prepared.config.training.batch_size != "auto":
        return prepared
    if tries:
        say("training.batch_size=auto: a step is tried in another process.")
    search = _Search(prepared, prepared.engine.free_memory(prepared.config.model), free_addresses())
    chosen, why = search.proven() if tries else search.planned()
    settled = _with(prepared, chosen.applied(prepared.config.training))
    say(_sentence(settled.config.training, why))
    return settled


def _with(prepared: Preparation, training: TrainingConfig) -> Preparation:
    config = prepared.config.model_copy(update={"training": training})
    batches = batch_plan(config, prepared.data, pad_id=prepared.tokenizer.pad_id)
    return replace(prepared, config=config, batches=batches)


@dataclass(frozen=True, slots=True)
class _Search:
    prepared: Preparation
    free: int  # bytes for arrays
    addresses: int | None  # bytes of address space

    def planned(self) -> tuple[Cut, str]:
        """The fastest cut whose prediction fits, else the smallest."""
        cuts = self._cuts()
        cut = self._fitting(cuts, 0) or min(cuts, key=lambda cut: cut.needed)
        return cut, f"predicted to take {_gb(cut.needed)} of {_gb(self.free)} that are free"

    def proven(self) -> tuple[Cut, str]:
        """The fastest cut that a step in another process has shown to fit.

        Each step that was measured says how far predictions are off, for the next choice.
        """
        left, off = self._cuts(), 0
        best: tuple[Cut, int] | None = None
        while cut := self._fitting(left, off) or (None if best or not left else min(left, key=_needed)):
            left.remove(cut)
            taken = self._taken(cut)
            if taken is not None and cut.needed:
                off = self._amount(taken) - cut.needed
            if taken is None or not self._fits(taken):
                left = _clearly_smaller(left, cut)
                continue
            best = (cut, self._amount(taken))
            left = [other for other in left if other.cost < _WORTH_ANOTHER * cut.cost]
        if best is None:
            raise TrainingError(
                f"training.batch_size=auto: even one row at a time, with activations recomputed, takes more than the "
                f"{_gb(self.free)} that are free. Lower data.max_length, set model.quantization: 4bit, or choose a "
                "smaller model."
            )
        return best[0], f"a step took {_gb(best[1])} of {_gb(self.free)} that are free"

    def _cuts(self) -> list[Cut]:
        prepared, training = self.prepared, self.prepared.config.training
        lengths = self._lengths()
        index = self._heaviest()
        tokens = int(lengths[prepared.batches.row_numbers(index)].sum())
        longest = max(int(lengths.max()), prepared.config.data.max_length or 0)
        return cuts_of(training, tokens=tokens, shortest_limit=longest, needed=self._needed)

    def _needed(self, training: TrainingConfig) -> int:
        prepared = _with(self.prepared, training)
        plan = memory_plan(prepared)
        return 0 if plan is None else needed_memory(plan, prepared)

    def _fitting(self, cuts: list[Cut], off: int) -> Cut | None:
        return next((cut for cut in cuts if cut.needed + off <= _PLANNED * self.free), None)

    def _taken(self, cut: Cut) -> Taken | None:
        """What a step takes; None where the process that tries it does not survive."""
        prepared = _with(self.prepared, cut.applied(self.prepared.config.training))
        config, plan = prepared.config, memory_plan(prepared)
        spares = plan is None or plan.returns_memory
        run = ProbedRun(prepared.source.path, config.model, config.training, config.lora, spares)
        return probe(run, self._heavy_batches(prepared))

    def _amount(self, taken: Taken) -> int:
        """Bytes of the kind that `free` counts."""
        if not self.prepared.on_cpu:
            return taken.arrays
        return max(taken.resident, 0 if self.addresses is None else taken.addresses)

    def _fits(self, taken: Taken) -> bool:
        if not self.prepared.on_cpu:
            return taken.arrays <= _PROVEN * self.free
        in_addresses = self.addresses is None or taken.addresses <= _PROVEN * self.addresses
        return in_addresses and taken.resident <= _PROVEN * self.free

    def _heavy_batches(self, prepared: Preparation) -> list[Batch]:
        """The largest micro-batch of the run, and one with its longest row."""
        lengths = self._lengths()
        largest = max(prepared.batches.step(self._heaviest()), key=lambda batch: batch.tokens)
        steps = range(prepared.batches.steps_per_epoch)
        row = int(lengths.argmax())
        step = next(step for step in steps if row in prepared.batches.row_numbers(step))
        return [largest, max(prepared.batches.step(step), key=lambda batch: int(batch.positions.max()))]

    def _heaviest(self) -> int:
        prepared, training = self.prepared, self.prepared.config.training
        return heaviest_step(
            prepared.batches,
            self._lengths(),
            count=prepared.plan.total_steps,
            max_rows=training.rows_per_step,
            max_tokens=None,
        )

    def _lengths(self) -> IntArray:
        return self.prepared.data.train_lengths - 1


def _clearly_smaller(cuts: list[Cut], failed: Cut) -> list[Cut]:
    """Those that need less by a tenth of what can be saved at all; without predictions, those that cost more."""
    if not failed.needed:
        return cuts
    least = min((cut.needed for cut in cuts), default=0)
    return [
        cut
        for cut in cuts
        if cut.needed <= failed.needed - 0.1 * (failed.needed - least) and cut.needed < failed.needed
    ]


def _needed(cut: Cut) -> int:
    return cut.needed


def _sentence(training: TrainingConfig, why: str) -> str:
    limit = training.max_batch_tokens
    cut = f"at most {limit:,} tokens in memory at once" if limit else "all in memory at once"
    again = "recomputed" if training.gradient_checkpointing else "kept"
    return (
        f"training.batch_size=auto: {training.rows_per_step} rows a step, {cut}, activations {again}: {why}. "
        f"What is learned does not depend on it."
    )


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB"

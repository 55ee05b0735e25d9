"""`training.batch_size: auto`: choose how steps are cut, confirm it with a step in another process, say so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from finetune.config.schema import TrainingConfig
from finetune.core.errors import TrainingError
from finetune.core.machine import free_addresses, own_memory, unused_memory, usable_cores
from finetune.core.types import Batch
from finetune.planning.cuts import Cut, cuts_of
from finetune.planning.probe import NotTaken, ProbedRun, Taken, probe
from finetune.workflows.memory import heavy_steps_of, memory_plan, needed_memory
from finetune.workflows.preparation import Preparation, batch_plan

_PLANNED = 0.95  # of free memory that a prediction may take before it is tried
_TRIED = 0.85  # of the memory beside this process: what has no room to be tried is inferred from what has
_PROVEN = 0.93  # of free memory that a tried step may take: evaluation, checkpoints and data need some besides
_PROVEN_ADDRESSES = 0.88  # of free addresses: evaluation maps more of them than it uses, by blocks and arenas
_INFERRED = 0.85  # of free memory that a step may take by what a smaller one took, where there is no room to try it
_LEFT = 0.03  # of free memory that a tried step leaves to everybody else
_WORTH_ANOTHER = 0.97  # of the cost of a proven cut, what a faster one may cost to be worth a try
# Tokens of a micro-batch for each core: a CPU is not faster with more, and 5 to 20 % slower with several times as many.
_ENOUGH = 1024

OnNotice = Callable[[str], None]


def settle_batch(prepared: Preparation, *, tries: bool, say: OnNotice) -> Preparation:
    """The preparation with `batch_size: auto` worked out; as it is where the configuration gives a number.

    `tries` confirms the choice by a step. Raises TrainingError where nothing fits.
    """
    if prepared.config.training.batch_size != "auto":
        return prepared
    heavy = heavy_steps_of(prepared, max_rows=prepared.config.training.rows_per_step)
    search = _Search(prepared, _Room.of(prepared), heavy)
    if tries:
        say("training.batch_size=auto: a step is tried in another process.")
    chosen, why = search.proven() if tries else search.planned()
    settled = _with(prepared, chosen.applied(prepared.config.training))
    say(_sentence(settled.config.training, why))
    return settled


def _with(prepared: Preparation, training: TrainingConfig) -> Preparation:
    config = prepared.config.model_copy(update={"training": training})
    batches = batch_plan(config, prepared.data, pad_id=prepared.tokenizer.pad_id)
    return replace(prepared, config=config, batches=batches)


class _Room(NamedTuple):
    """Bytes that a step may take, and that one may take that is tried."""

    free: int  # for arrays
    addresses: int | None  # of address space
    beside: int | None  # that a process which tries a step takes besides; None: where arrays are elsewhere

    @classmethod
    def of(cls, prepared: Preparation) -> Self:
        """At this moment. Another process is about as large as this one."""
        free = prepared.engine.free_memory(prepared.config.model)
        return cls(free, free_addresses(), own_memory() if prepared.on_cpu else None)

    @property
    def beside_this(self) -> int:
        """What there is for a step that is tried. Addresses are each process's own; memory is for both."""
        return self.free if self.beside is None else min(self.free, unused_memory() - self.beside)

    @property
    def to_try(self) -> float:
        """What a step that is tried should need at most."""
        return _PLANNED * self.free if self.beside_this == self.free else _TRIED * self.beside_this


class _Proven(NamedTuple):
    cut: Cut
    took: int  # bytes


@dataclass(slots=True)
class _Search:
    prepared: Preparation
    room: _Room
    heavy: Sequence[int]  # the steps that may need most
    off: int = 0  # bytes that steps take more than predicted, by the last one that was measured
    most_off: int = 0  # the same, by the worst, and at least by one that could not be measured
    times_off: float = 1.0  # the same, as a multiple of what was predicted
    ended: str = ""  # how the last process ended that took no step
    fault: bool = False  # whether that was for something else than memory

    def planned(self) -> tuple[Cut, str]:
        """The fastest cut whose prediction fits, else the smallest."""
        cuts = self._cuts()
        cut = self._expected(cuts, _PLANNED * self.room.free) or min(cuts, key=_needed)
        return cut, f"predicted to take {_gb(cut.needed)} of {_gb(self.room.free)} that are free"

    def proven(self) -> tuple[Cut, str]:
        """The fastest cut that a step in another process has shown to fit.

        Each step that was measured says how far predictions are off, for the next choice. The process that tries takes
        memory besides: a cut for which both is too much is chosen by what the largest one took that could be tried.
        """
        cuts = self._cuts()
        left = list(cuts)
        best: _Proven | None = None
        while cut := self._next(left, best):
            left.remove(cut)
            took = self._took(cut)
            if self.fault:
                cut, why = self.planned()
                return cut, f"{why}, not tried, because the process that should failed ({self.ended})"
            if took is None:
                left = _clearly_smaller(left, cut)
            else:
                best = _Proven(cut, took)
                left = [other for other in left if other.cost < _WORTH_ANOTHER * cut.cost]
        if best is None:
            raise TrainingError(self._nothing_fits())
        if larger := self._inferred(cuts, best.cut):
            needed, free = _gb(self._at_most(larger)), _gb(self.room.free)
            return larger, f"a step takes {needed} of {free} that are free, by what a smaller one took"
        return best.cut, f"a step took {_gb(best.took)} of {_gb(self.room.free)} that are free"

    def _next(self, left: list[Cut], best: _Proven | None) -> Cut | None:
        """What to try: the fastest that should fit beside this process, else the smallest that may be all there is."""
        fitting = self._expected(left, self.room.to_try)
        return fitting if fitting or best or not left else min(left, key=_needed)

    def _inferred(self, cuts: list[Cut], proven: Cut) -> Cut | None:
        """The fastest cut for which there is no room to try it, and room to take it."""
        if self.room.beside is None:
            return None
        faster = (cut for cut in cuts if cut.needed and cut.cost < _WORTH_ANOTHER * proven.cost)
        untried = (cut for cut in faster if cut.needed + self.off > self.room.to_try)
        return next((cut for cut in untried if self._at_most(cut) <= _INFERRED * self.room.free), None)

    def _at_most(self, cut: Cut) -> int:
        """Bytes, if what tried steps took more than predicted is the same for all cuts, or grows with them.

        The worse counts; that a small step took less than predicted does not.
        """
        return int(max(cut.needed + self.most_off, cut.needed * self.times_off))

    def _expected(self, cuts: list[Cut], room: float) -> Cut | None:
        return next((cut for cut in cuts if cut.needed + self.off <= room), None)

    def _nothing_fits(self) -> str:
        return (
            "training.batch_size=auto: even one row at a time, with activations recomputed, takes more than the "
            f"{_gb(self.room.free)} that are free{f' ({self.ended})' if self.ended else ''}. "
            "Lower data.max_length, set model.quantization: 4bit, or choose a smaller model."
        )

    def _cuts(self) -> list[Cut]:
        prepared, lengths = self.prepared, self.prepared.data.train_lengths
        tokens = max(int((lengths[prepared.batches.row_numbers(index)] - 1).sum()) for index in self.heavy)
        longest = max(int(lengths.max()) - 1, prepared.config.data.max_length or 0)
        enough = _ENOUGH * usable_cores() if prepared.on_cpu else None
        training, needed = prepared.config.training, self._needed
        return cuts_of(training, tokens=tokens, shortest_limit=longest, needed=needed, enough=enough)

    def _needed(self, training: TrainingConfig) -> int:
        prepared = _with(self.prepared, training)
        plan = memory_plan(prepared, self.heavy)
        return 0 if plan is None else needed_memory(plan, prepared)

    def _took(self, cut: Cut) -> int | None:
        """Bytes of the kind that `room.free` counts; None where that is too much."""
        prepared = _with(self.prepared, cut.applied(self.prepared.config.training))
        config, plan = prepared.config, memory_plan(prepared, self.heavy)
        spares = plan is None or plan.returns_memory
        run = ProbedRun(prepared.source.path, config.model, config.training, config.lora, spares)
        taken = probe(run, self._heavy_batches(prepared), leave=int(_LEFT * self.room.free))
        if isinstance(taken, NotTaken):
            self.ended, self.fault = taken.why, not taken.for_memory
            self._exceeded(cut, self.room.beside_this)
            return None
        took, fits = self._amount(taken), self._fits(taken)
        if cut.needed:
            self.off = took - cut.needed
        self._exceeded(cut, took)
        if self.room.beside is not None:
            self.room = self.room._replace(beside=taken.beside)
        return took if fits else None

    def _exceeded(self, cut: Cut, took: int) -> None:
        """Remember by how much a step took more than predicted, at least."""
        if cut.needed:
            self.most_off = max(self.most_off, took - cut.needed)
            self.times_off = max(self.times_off, took / cut.needed)

    def _amount(self, taken: Taken) -> int:
        if self.room.beside is None:
            return taken.arrays
        return max(taken.resident, 0 if self.room.addresses is None else taken.addresses)

    def _fits(self, taken: Taken) -> bool:
        if self.room.beside is None:
            return taken.arrays <= _PROVEN * self.room.free
        in_addresses = self.room.addresses is None or taken.addresses <= _PROVEN_ADDRESSES * self.room.addresses
        return in_addresses and taken.resident <= _PROVEN * self.room.free

    def _heavy_batches(self, prepared: Preparation) -> list[Batch]:
        """The largest micro-batch of the run, and one with its longest row."""
        batches = [batch for index in self.heavy for batch in prepared.batches.step(index)]
        largest = max(batches, key=lambda batch: batch.tokens)
        steps = range(prepared.batches.steps_per_epoch)
        row = int(prepared.data.train_lengths.argmax())
        step = next(step for step in steps if row in prepared.batches.row_numbers(step))
        return [largest, max(prepared.batches.step(step), key=lambda batch: int(batch.positions.max()))]


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

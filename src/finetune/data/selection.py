"""Loaded rows to rows that can be trained on; everything that is left out on the way is counted."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError, UsageError
from finetune.data.checks import LengthSummary, check_error_rate, summarise_lengths
from finetune.data.groups import Positions, conflicting, group
from finetune.data.loaded import LoadedData
from finetune.data.report import DataReport, RowCounts
from finetune.data.stored_rows import StoredRows
from finetune.data.token_store import IS_REFUSED, ROLES

_LABELS = {"desirable": 1, "undesirable": 0, "unlabelled": -1}


class Fate(IntEnum):
    """What becomes of a usable row. One that is several of these is counted as the first."""

    KEPT = 0
    CUT = 1  # kept, without its end
    DUPLICATE = 2
    UNDESIRABLE = 3
    REFUSED = 4  # by the template
    TOO_LONG = 5
    UNTRAINED = 6
    LEFT_OUT = 7  # by the weight of its file


@dataclass(frozen=True, slots=True)
class RowFates:
    """What becomes of each usable row, with the limit that decides about its length."""

    loaded: LoadedData
    of_rows: npt.NDArray[np.uint8]  # a Fate for each position
    max_length: int

    @property
    def kept(self) -> Positions:
        """Positions of the rows that remain, in the order of the files."""
        return np.flatnonzero(self.of_rows <= Fate.CUT)

    def number(self, fate: Fate) -> int:
        """How many rows have this one."""
        return int((self.of_rows == fate).sum())


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that remain, in the order of the files, and the account of the others."""

    fates: RowFates
    positions: Positions  # of the rows that remain
    unseen_roles: dict[str, int]  # role to number of rows in which the template leaves it out
    account: DataReport  # `trained` and `validation` are 0 until the rows are split

    def rows(self, positions: Positions) -> StoredRows:
        """Encoded rows, cut to the limit."""
        return StoredRows(self.fates.loaded, positions, self.fates.max_length)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows are neither undesirable nor a further copy, and which of these have tokens."""

    mask: npt.NDArray[np.bool_]
    encoded: npt.NDArray[np.bool_]
    copies: npt.NDArray[np.bool_]
    undesirable: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, loaded: LoadedData, *, include_undesirable: bool, keep_duplicates: bool) -> "Wanted":
        copies = np.zeros(len(loaded), np.bool_) if keep_duplicates else group(loaded.column("row")).copies()
        undesirable = (loaded.column("label") == 0) & (not include_undesirable)
        mask = ~copies & ~undesirable
        return cls(mask, mask & (loaded.column("flags") & IS_REFUSED == 0), copies, undesirable)


def select_rows(
    loaded: LoadedData, config: DataConfig, *, context_length: int | None, keep_duplicates: bool = False
) -> Selection:
    """Leave out undesirable rows and copies, and bring the rest to length. Raises DataError, UsageError."""
    wanted = Wanted.of(loaded, include_undesirable=config.include_undesirable, keep_duplicates=keep_duplicates)
    refusals = tuple(problem for position, problem in loaded.refusals() if wanted.mask[position])
    check_error_rate(loaded.names, refusals, int(wanted.mask.sum()), config.max_error_rate)
    lengths = loaded.column("length").astype(np.int64)
    summary = summarise_lengths(lengths[wanted.encoded])
    max_length = choose_max_length(config.max_length, context_length, summary)
    if config.on_long == "error":
        _refuse_long(loaded, wanted.encoded, lengths, max_length)
    fates = fates_of(loaded, wanted, max_length, drop_long=config.on_long == "drop")
    positions = fates.kept
    if not len(positions):
        raise DataError(_nothing_left(loaded.names, config, int(wanted.undesirable.sum()), summary, max_length))
    bad = len(loaded.problems) + len(refusals)
    labels = loaded.column("label")
    account = DataReport(
        rows=_counts(wanted, fates, bad),
        files=tuple(file.report() for file in loaded.files),
        labels=label_counts(labels),
        conflicts=_conflicts(loaded, labels),
        problems=(*loaded.problems, *refusals),
        dropped=_reasons(bad, fates),
        lengths=summary,
        max_length=max_length,
    )
    return Selection(fates, positions, _unseen(loaded, wanted.encoded), account)


def fates_of(loaded: LoadedData, wanted: Wanted, max_length: int, *, drop_long: bool) -> RowFates:
    """Cut or drop rows of more than `max_length` tokens; drop rows without a trained token within them."""
    long = wanted.encoded & (loaded.column("length") > max_length)
    trained_from = loaded.column("trained_from")
    fates = np.full(len(loaded), Fate.KEPT, np.uint8)
    fates[wanted.undesirable] = Fate.UNDESIRABLE
    fates[wanted.copies] = Fate.DUPLICATE
    fates[wanted.mask & ~wanted.encoded] = Fate.REFUSED
    fates[long] = Fate.CUT
    fates[wanted.encoded & ((trained_from < 0) | (trained_from >= max_length))] = Fate.UNTRAINED
    if drop_long:
        fates[long] = Fate.TOO_LONG
    return RowFates(loaded, fates, max_length)


def choose_max_length(wanted: int | None, context_length: int | None, lengths: LengthSummary | None) -> int:
    """`data.max_length`, else the longest row; never more than the model's context (UsageError)."""
    check_max_length(wanted, context_length)
    longest = lengths.longest if lengths else 0
    return wanted if wanted is not None else min(longest, context_length or longest)


def check_max_length(wanted: int | None, context_length: int | None, *, given_in: str = "") -> None:
    """Refuse (UsageError) rows longer than the model's context; `given_in` is where the length was set."""
    if wanted is not None and context_length is not None and wanted > context_length:
        place = f" ({given_in})" if given_in else ""
        raise UsageError(
            f"data.max_length={wanted:,}{place} is more than the model's {context_length:,}. "
            "Lower it, or choose a model with a longer context."
        )


def label_counts(labels: npt.NDArray[Any]) -> dict[str, int]:
    """How many rows carry each label."""
    return {name: int((labels == value).sum()) for name, value in _LABELS.items()}


def _conflicts(loaded: LoadedData, labels: npt.NDArray[Any]) -> int:
    """Requests with both labels."""
    both = bool((labels == 0).any() and (labels == 1).any())
    return len(conflicting(group(loaded.column("prompt")), labels)) if both else 0


def _refuse_long(
    loaded: LoadedData, encoded: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64], max_length: int
) -> None:
    long = np.flatnonzero(encoded & (lengths > max_length))
    if len(long):
        first = "; ".join(f"{loaded.origin(position)} has {lengths[position]:,}" for position in long[:5].tolist())
        raise DataError(
            f"{len(long):,} rows are longer than data.max_length={max_length:,} tokens, and data.on_long is error: "
            f"{first}. Raise data.max_length to {lengths[long].max():,}, or set data.on_long to truncate or drop."
        )


def _unseen(loaded: LoadedData, encoded: npt.NDArray[np.bool_]) -> dict[str, int]:
    bits = loaded.column("unseen")[encoded]
    rows = {role: np.flatnonzero(bits & (1 << number)) for number, role in enumerate(ROLES)}
    ordered = sorted((int(places[0]), role) for role, places in rows.items() if len(places))
    return {role: len(rows[role]) for _, role in ordered}


def _counts(wanted: Wanted, fates: RowFates, bad: int) -> RowCounts:
    return RowCounts(
        read=fates.loaded.rows,
        trained=0,
        validation=0,
        dropped=bad + fates.number(Fate.TOO_LONG) + fates.number(Fate.UNTRAINED),
        truncated=fates.number(Fate.CUT),
        duplicates=int(wanted.copies.sum()),
        undesirable=int(wanted.undesirable.sum()),
        undesirable_duplicates=int((wanted.copies & wanted.undesirable).sum()),
    )


def _reasons(bad: int, fates: RowFates) -> dict[str, int]:
    reasons = {
        "cannot be used": bad,
        "longer than max_length": fates.number(Fate.TOO_LONG),
        "no trained token within max_length": fates.number(Fate.UNTRAINED),
    }
    return {reason: count for reason, count in reasons.items() if count}


def _nothing_left(
    names: str, config: DataConfig, undesirable: int, lengths: LengthSummary | None, max_length: int
) -> str:
    if lengths is None:
        if undesirable:
            return (
                f"{names}: no row is left: all {undesirable:,} rows are labelled undesirable. "
                "Set data.include_undesirable to true to train on them all the same."
            )
        return f"{names}: no row is left to train on."
    reach = f"The rows have {lengths.shortest:,} to {lengths.longest:,} tokens (median {lengths.median:,})"
    if config.on_long == "drop" and lengths.shortest > max_length:
        return (
            f"{names}: no row is left: all are longer than data.max_length={max_length:,}. {reach}: "
            f"raise it to {lengths.recommended:,}, or set data.on_long to truncate."
        )
    return (
        f"{names}: no row is left: within data.max_length={max_length:,} tokens no row reaches its answer, so there is "
        f"nothing to train on. {reach}: raise it to {lengths.recommended:,}."
    )

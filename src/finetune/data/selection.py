"""Loaded rows to rows that can be trained on; everything that is left out on the way is counted."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError, UsageError
from finetune.data.checks import LengthSummary, check_error_rate
from finetune.data.columns import Positions
from finetune.data.fates import Fate, RowFates, Survey, WantedRows
from finetune.data.loaded import LoadedData
from finetune.data.report import DataReport, RowCounts
from finetune.data.stored_rows import StoredRows

_SHOWN = 5


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


def select_rows(
    loaded: LoadedData, config: DataConfig, *, context_length: int | None, keep_duplicates: bool = False
) -> Selection:
    """Leave out undesirable rows and copies, and bring the rest to length. Raises DataError, UsageError."""
    wanted = WantedRows.of(loaded, include_undesirable=config.include_undesirable, keep_duplicates=keep_duplicates)
    survey = Survey.of(wanted)
    refusals = tuple(problem for position, problem in loaded.refusals() if position in survey.refused)
    check_error_rate(loaded.names, refusals, survey.wanted, config.max_error_rate)
    summary = survey.lengths.summary()
    max_length = choose_max_length(config.max_length, context_length, summary)
    if config.on_long == "error":
        _refuse_long(wanted, max_length)
    fates = wanted.fates(max_length, drop_long=config.on_long == "drop")
    positions = fates.kept
    if not len(positions):
        raise DataError(_nothing_left(loaded.names, config, survey.undesirable, summary, max_length))
    bad = len(loaded.problems) + len(refusals)
    account = DataReport(
        rows=_counts(survey, fates, bad),
        files=tuple(file.report() for file in loaded.files),
        labels=survey.labels,
        conflicts=sum(1 for _ in conflicts(loaded, survey)),
        problems=(*loaded.problems, *refusals),
        dropped=_reasons(bad, fates),
        lengths=summary,
        longer=survey.lengths.beyond(max_length),
        max_length=max_length,
    )
    return Selection(fates, positions, survey.unseen_roles(), account)


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


def conflicts(loaded: LoadedData, survey: Survey) -> Iterator[Positions]:
    """Requests with both labels: the labelled rows of each."""
    both = survey.labels["desirable"] and survey.labels["undesirable"]
    return loaded.by_digest("prompt").conflicts() if both else iter(())


def _refuse_long(wanted: WantedRows, max_length: int) -> None:
    first, count, longest = list[str](), 0, 0
    for rows in wanted.windows():
        lengths = rows.records["length"]
        for at in np.flatnonzero(rows.encoded & (lengths > max_length)).tolist():
            count, longest = count + 1, max(longest, int(lengths[at]))
            if count <= _SHOWN:
                first.append(f"{wanted.loaded.origin(rows.start + at)} has {lengths[at]:,}")
    if count:
        raise DataError(
            f"{count:,} rows are longer than data.max_length={max_length:,} tokens, and data.on_long is error: "
            f"{'; '.join(first)}. Raise data.max_length to {longest:,}, or set data.on_long to truncate or drop."
        )


def _counts(survey: Survey, fates: RowFates, bad: int) -> RowCounts:
    return RowCounts(
        read=fates.loaded.rows,
        trained=0,
        validation=0,
        dropped=bad + fates.number(Fate.TOO_LONG) + fates.number(Fate.UNTRAINED),
        truncated=fates.number(Fate.CUT),
        duplicates=survey.copies,
        undesirable=survey.undesirable,
        undesirable_duplicates=survey.undesirable_copies,
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

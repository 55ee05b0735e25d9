"""Loaded rows to rows that can be trained on; everything that is left out on the way is counted."""

from dataclasses import dataclass

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError, UsageError
from finetune.data.checks import (
    LengthSummary,
    check_error_rate,
    conflicting_prompts,
    label_counts,
    repeated,
    summarise_lengths,
)
from finetune.data.load import LoadedData
from finetune.data.report import DataReport, RowCounts
from finetune.data.rows import EncodedRow, Example
from finetune.data.templates import Template
from finetune.data.tokenize import LimitedRows, encode_examples, limit_rows
from finetune.data.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that remain, in the order of the files, and the account of the others."""

    examples: list[Example]  # in step with `rows` and `weights`
    rows: list[EncodedRow]
    weights: list[float]
    max_length: int
    unseen_roles: dict[str, int]
    account: DataReport  # `trained` and `validation` are 0 until the rows are split


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Positions of the examples that are neither undesirable nor a further copy."""

    positions: list[int]
    duplicates: int
    undesirable: int
    both: int


def select_rows(
    loaded: LoadedData,
    config: DataConfig,
    *,
    template: Template,
    tokenizer: TextTokenizer,
    context_length: int | None,
    keep_duplicates: bool = False,
) -> Selection:
    """Leave out undesirable rows and copies, encode the rest, bring it to length. Raises DataError, UsageError."""
    wanted = _wanted(loaded.examples, config, keep_duplicates)
    encoded = encode_examples(
        [loaded.examples[position] for position in wanted.positions],
        template=template,
        tokenizer=tokenizer,
        train_on_prompt=config.train_on_prompt,
    )
    names = ", ".join(file.path for file in loaded.files)
    check_error_rate(names, encoded.problems, len(wanted.positions), config.max_error_rate)
    lengths = summarise_lengths([len(row) for row in encoded.rows])
    max_length = choose_max_length(config.max_length, context_length, lengths)
    limited = limit_rows(encoded.rows, max_length=max_length, on_long=config.on_long)
    if not limited.rows:
        raise DataError(_nothing_left(names, config, wanted, lengths, max_length))
    weight_of = {id(loaded.examples[p]): loaded.weights[p] for p in wanted.positions}
    examples = [encoded.examples[position] for position in limited.kept]
    bad = len(loaded.problems) + len(encoded.problems)
    account = DataReport(
        rows=_counts(loaded.rows, bad, wanted, limited),
        files=tuple(loaded.files),
        labels=label_counts(loaded.examples),
        conflicts=len(conflicting_prompts(loaded.examples)),
        problems=(*loaded.problems, *encoded.problems),
        dropped=_reasons(bad, limited),
        lengths=lengths,
        max_length=max_length,
    )
    weights = [weight_of[id(example)] for example in examples]
    return Selection(examples, limited.rows, weights, max_length, encoded.unseen_roles, account)


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


def _wanted(examples: list[Example], config: DataConfig, keep_duplicates: bool) -> _Wanted:
    copies = set[int]() if keep_duplicates else set(repeated(examples))
    refused = {
        position
        for position, example in enumerate(examples)
        if example.desirable is False and not config.include_undesirable
    }
    positions = [p for p in range(len(examples)) if p not in copies and p not in refused]
    return _Wanted(positions, len(copies), len(refused), len(copies & refused))


def _counts(read: int, bad: int, wanted: _Wanted, limited: LimitedRows) -> RowCounts:
    return RowCounts(
        read=read,
        trained=0,
        validation=0,
        dropped=bad + limited.too_long + limited.untrained,
        truncated=limited.truncated,
        duplicates=wanted.duplicates,
        undesirable=wanted.undesirable,
        undesirable_duplicates=wanted.both,
    )


def _reasons(bad: int, limited: LimitedRows) -> dict[str, int]:
    reasons = {
        "cannot be used": bad,
        "longer than max_length": limited.too_long,
        "no trained token within max_length": limited.untrained,
    }
    return {reason: count for reason, count in reasons.items() if count}


def _nothing_left(
    names: str, config: DataConfig, wanted: _Wanted, lengths: LengthSummary | None, max_length: int
) -> str:
    if lengths is None:
        if wanted.undesirable:
            return (
                f"{names}: no row is left: all {wanted.undesirable:,} rows are labelled undesirable. "
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

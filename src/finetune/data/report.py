"""What became of the rows: every row that was read is in exactly one place, and the numbers add up."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.data.checks import LengthSummary
from finetune.data.rows import Problem


@dataclass(frozen=True, slots=True)
class RowCounts:
    """read + undesirable_duplicates = trained + validation + dropped + duplicates + undesirable."""

    read: int  # rows of the training files, bad ones included
    trained: int  # different rows in the training set
    validation: int  # rows set apart from the training files
    dropped: int  # bad, too long, or without a trained token
    truncated: int  # cut to max_length; part of `trained` and `validation`
    duplicates: int  # further copies of a row; one copy of each stays
    undesirable: int  # labelled undesirable, left out
    undesirable_duplicates: int = 0  # both of the last two, so counted twice


@dataclass(frozen=True, slots=True)
class FileReport:
    """One data file as it was found."""

    path: str
    format: str
    encoding: str
    shape: str
    sha256: str
    rows: int
    bad_rows: int
    unused_columns: dict[str, int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The whole account of a data set. `lengths` are in tokens, of the rows before they are cut."""

    rows: RowCounts
    files: tuple[FileReport, ...]
    labels: Mapping[str, int]
    conflicts: int  # requests that occur with both labels
    problems: tuple[Problem, ...]
    dropped: Mapping[str, int]  # reason to number of rows
    lengths: LengthSummary | None
    longer: int  # rows of more than `max_length` tokens: cut, or dropped
    max_length: int
    validation: "DataReport | None" = field(default=None)  # of a validation file of its own

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; problems as `place: reason`."""
        return {
            "rows": asdict(self.rows),
            "files": [asdict(file) for file in self.files],
            "labels": dict(self.labels),
            "conflicts": self.conflicts,
            "problems": [str(problem) for problem in self.problems],
            "dropped": dict(self.dropped),
            "lengths": lengths_as_dict(self.lengths),
            "longer": self.longer,
            "max_length": self.max_length,
            "validation": self.validation.as_dict() if self.validation else None,
        }


def lengths_as_dict(lengths: LengthSummary | None) -> dict[str, Any] | None:
    """The summary with its recommendation, for JSON."""
    if lengths is None:
        return None
    histogram = [{"up_to": bound, "rows": rows} for bound, rows in lengths.histogram]
    return {**asdict(lengths), "histogram": histogram, "recommended_max_length": lengths.recommended}

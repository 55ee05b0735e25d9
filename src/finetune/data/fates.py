"""What becomes of each usable row: worked out window by window, so that any number of rows takes the same memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from finetune.core.types import BoolArray
from finetune.data.checks import LengthCounts
from finetune.data.columns import Positions, pieces_of, release, row_array, stored, where
from finetune.data.loaded import LoadedData
from finetune.data.rows import Origin
from finetune.data.token_store import IS_REFUSED, ROLES, Table

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
    steps_back: Positions | None  # from a copy to the first row like it; None: copies are kept
    max_length: int

    @property
    def kept(self) -> Positions:
        """Positions of the rows that remain, in the order of the files."""
        return where(self.of_rows, lambda fates: fates <= Fate.CUT)

    def number(self, fate: Fate) -> int:
        """How many rows have this one."""
        return sum(int((part == fate).sum()) for part in pieces_of(self.of_rows))

    def first_like(self, position: int) -> Origin:
        """Where the first row stands that this one is a copy of."""
        assert self.steps_back is not None
        return self.loaded.origin(position - int(self.steps_back[position]))

    def without(self, left_out: Positions) -> "RowFates":
        """The same, with rows that the weights of their files leave out."""
        if not len(left_out):
            return self
        gone = row_array(len(self.of_rows), np.bool_)
        for part in pieces_of(left_out):
            gone[part] = True
            release(gone)
        parts = zip(pieces_of(self.of_rows), pieces_of(gone), strict=True)
        of_rows = stored((np.where(without, np.uint8(Fate.LEFT_OUT), fates) for fates, without in parts), np.uint8)
        return RowFates(self.loaded, of_rows, self.steps_back, self.max_length)


@dataclass(frozen=True, slots=True)
class WantedWindow:
    """Some rows: which are further copies, which undesirable, which neither, and which of the last have tokens."""

    start: int  # position of the first
    records: Table
    copies: BoolArray
    undesirable: BoolArray
    wanted: BoolArray
    encoded: BoolArray


@dataclass(frozen=True, slots=True)
class WantedRows:
    """The rows of the data in windows, each judged without regard to its length."""

    loaded: LoadedData
    steps_back: Positions | None
    include_undesirable: bool

    @classmethod
    def of(cls, loaded: LoadedData, *, include_undesirable: bool, keep_duplicates: bool) -> "WantedRows":
        back = None if keep_duplicates else loaded.by_digest("row").steps_back()
        return cls(loaded, back, include_undesirable)

    def windows(self) -> Iterator[WantedWindow]:
        """All rows, in their order."""
        for start, records in self.loaded.windows():
            copies = np.zeros(len(records), np.bool_)
            if self.steps_back is not None:
                copies = self.steps_back[start : start + len(records)] > 0
                release(self.steps_back)
            undesirable = (records["label"] == 0) & (not self.include_undesirable)
            wanted = ~copies & ~undesirable
            encoded = wanted & (records["flags"] & IS_REFUSED == 0)
            yield WantedWindow(start, records, copies, undesirable, wanted, encoded)

    def fates(self, max_length: int, *, drop_long: bool, tokens: bool = True) -> RowFates:
        """Cut or drop rows of more than `max_length` tokens; drop rows without a trained token within them.

        Without `tokens`, where rows are not encoded, none is judged by them.
        """
        pieces = (_fates(rows, max_length, drop_long) * (tokens | ~rows.encoded) for rows in self.windows())
        return RowFates(self.loaded, stored(pieces, np.uint8), self.steps_back, max_length)


def _fates(rows: WantedWindow, max_length: int, drop_long: bool) -> npt.NDArray[np.uint8]:
    long = rows.encoded & (rows.records["length"] > max_length)
    trained_from = rows.records["trained_from"]
    fates = np.full(len(rows.records), Fate.KEPT, np.uint8)
    fates[rows.undesirable] = Fate.UNDESIRABLE
    fates[rows.copies] = Fate.DUPLICATE
    fates[rows.wanted & ~rows.encoded] = Fate.REFUSED
    fates[long] = Fate.CUT
    fates[rows.encoded & ((trained_from < 0) | (trained_from >= max_length))] = Fate.UNTRAINED
    if drop_long:
        fates[long] = Fate.TOO_LONG
    return fates


@dataclass(slots=True)
class Survey:
    """Counts over all rows, from one pass."""

    wanted: int = 0
    copies: int = 0
    undesirable: int = 0
    undesirable_copies: int = 0
    labels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_LABELS, 0))
    lengths: LengthCounts = field(default_factory=LengthCounts)  # of the wanted rows, in tokens
    refused: set[int] = field(default_factory=set)  # positions of wanted rows
    unseen: dict[str, tuple[int, int]] = field(default_factory=dict)  # role to its first row and number of rows

    @classmethod
    def of(cls, rows: WantedRows) -> "Survey":
        survey = cls()
        for window in rows.windows():
            survey._count(window)
        return survey

    def unseen_roles(self) -> dict[str, int]:
        """Roles that the template leaves out in some rows, in the order of the first of these, with their number."""
        ordered = sorted((first, role, rows) for role, (first, rows) in self.unseen.items())
        return {role: rows for _, role, rows in ordered}

    def _count(self, window: WantedWindow) -> None:
        records = window.records
        self.wanted += int(window.wanted.sum())
        self.copies += int(window.copies.sum())
        self.undesirable += int(window.undesirable.sum())
        self.undesirable_copies += int((window.copies & window.undesirable).sum())
        for name, label in _LABELS.items():
            self.labels[name] += int((records["label"] == label).sum())
        self.lengths.add(records["length"][window.encoded])
        self.refused |= set((window.start + np.flatnonzero(window.wanted & ~window.encoded)).tolist())
        for number, role in enumerate(ROLES):
            rows = np.flatnonzero(window.encoded & (records["unseen"] & (1 << number) != 0))
            if len(rows):
                first, count = self.unseen.get(role, (window.start + int(rows[0]), 0))
                self.unseen[role] = (first, count + len(rows))

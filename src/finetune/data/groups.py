"""Which rows are equal, found from their digests: numbers instead of a Python object for each row."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.data.columns import Positions, put, row_array
from finetune.data.partition import Partition, Records

Digests: TypeAlias = npt.NDArray[np.uint64]  # [rows, words]

# A row among those that are compared: its digest, its number and its label.
KEYED = np.dtype([("key", "<u8", (4,)), ("row", "<i8"), ("label", "i1")])


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows with equal digests. `of_row[p]` is the number of the group of row p, `first[g]` the first row of group g."""

    of_row: Positions
    first: Positions

    def __len__(self) -> int:
        return len(self.first)

    def copies(self) -> npt.NDArray[np.bool_]:
        """Which rows are equal to an earlier one."""
        found = np.ones(len(self.of_row), np.bool_)
        found[self.first] = False
        return found

    def sizes(self) -> Positions:
        """Rows of each group."""
        return np.bincount(self.of_row, minlength=len(self.first)).astype(np.int64)

    def having(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which groups have at least one of these rows (a mask, or positions)."""
        found = np.zeros(len(self.first), np.bool_)
        found[self.of_row[rows]] = True
        return found

    def members(self, chosen: npt.NDArray[np.bool_]) -> Iterator[Positions]:
        """The rows of each group that is chosen, ascending."""
        rows = np.flatnonzero(chosen[self.of_row])
        rows = rows[np.argsort(self.of_row[rows], kind="stable")]
        if len(rows):
            yield from np.split(rows, np.flatnonzero(np.diff(self.of_row[rows])) + 1)


def group(digests: Digests) -> Groups:
    """Group rows by the first 128 bits of their digests, in the order of the digests."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: within a group rows keep their order
    begins = np.zeros(len(order), np.bool_)
    begins[:1] = True
    for word in range(2):
        ordered = digests[:, word][order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    of_row = np.empty(len(order), np.int64)
    of_row[order] = np.cumsum(begins) - 1
    return Groups(of_row, order[begins])


class Keyed:
    """Rows that are compared by their digests, in parts that have all rows of each group."""

    def __init__(self, windows: Callable[[], Iterable[Records]], count: int) -> None:
        """`windows` gives `count` KEYED records, ascending by row, twice."""
        self.count = count
        self._partition = Partition(windows, count, KEYED)

    def __iter__(self) -> Iterator[tuple[Records, Groups]]:
        """Parts in the order of the digests."""
        for part in self._partition:
            yield part, group(part["key"])

    def steps_back(self) -> Positions:
        """For each row how many rows before it the first one of its group is: 0 for those that are first [rows]."""
        back = row_array(self.count, np.int64)
        for part, groups in self:
            copies = np.flatnonzero(groups.copies())
            rows = part["row"]
            put(back, rows[copies], rows[copies] - rows[groups.first[groups.of_row[copies]]])
        return back

    def of_several(self) -> Iterator[Positions]:
        """The rows of each group that has more than one."""
        for part, groups in self:
            for members in groups.members(groups.sizes() > 1):
                yield part["row"][members]

    def conflicts(self) -> Iterator[Positions]:
        """Groups with rows labelled desirable and rows labelled undesirable: the labelled rows of each."""
        for part, groups in self:
            labels = part["label"]
            both = groups.having(labels == 1) & groups.having(labels == 0)
            for members in groups.members(both) if both.any() else ():
                yield part["row"][members[labels[members] >= 0]]


def keyed(rows: Positions, digests: Digests, labels: npt.NDArray[np.int8] | int = -1) -> Records:
    """KEYED records."""
    records = np.zeros(len(rows), KEYED)
    records["key"][:, : digests.shape[1]] = digests
    records["row"], records["label"] = rows, labels
    return records

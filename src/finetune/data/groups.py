"""Which rows are equal, found from their digests: numbers instead of a Python object for each row."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Digests: TypeAlias = npt.NDArray[np.uint64]  # [rows, words]
Positions: TypeAlias = npt.NDArray[np.int64]


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


def group(digests: Digests) -> Groups:
    """Group rows by the first 128 bits of their digests, in no particular order."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: within a group rows keep their order
    begins = np.zeros(len(order), np.bool_)
    begins[:1] = True
    for word in range(2):
        ordered = digests[:, word][order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    of_row = np.empty(len(order), np.int64)
    of_row[order] = np.cumsum(begins) - 1
    return Groups(of_row, order[begins])


def conflicting(prompts: Groups, labels: npt.NDArray[Any]) -> Positions:
    """Groups of which some rows are labelled desirable and some undesirable, in the order of their first rows."""
    both = prompts.having(labels == 1) & prompts.having(labels == 0)
    numbers = np.flatnonzero(both)
    labelled = np.flatnonzero(labels >= 0)
    first = np.full(len(prompts), len(labels), np.int64)
    np.minimum.at(first, prompts.of_row[labelled], labelled)
    return numbers[np.argsort(first[numbers], kind="stable")]

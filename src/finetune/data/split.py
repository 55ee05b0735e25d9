"""Training and validation rows from one set: by a seed, in the proportion of the labels, no prompt on both sides."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from finetune.core.types import BoolArray
from finetune.data.columns import Positions, pieces_of, put, release, row_array, stored, where
from finetune.data.groups import Keyed
from finetune.data.partition import Partition, Records

_LABELS = (-1, 0, 1)
# Rows with the same request: a number that the seed draws for them, how many they are, and which labels they have.
_GROUP = np.dtype([("key", "<u8", (1,)), ("number", "<i8"), ("rows", "<i8"), ("labels", "u1")])


def split_rows(requests: Keyed, *, share: float, seed: int) -> tuple[Positions, Positions]:
    """Positions of the training and of the validation rows, each ascending.

    `requests` are rows by the digests of their requests: those with the same request stay together. Each set of
    labels gives about `share` of its rows; with two requests or more, each side gets at least one row.
    """
    chosen = row_array(requests.count, np.bool_)
    groups = stored(_groups(requests, seed) if share > 0 else (), _GROUP)
    if len(groups) > 1:
        _choose(chosen, requests, _held_out(groups, share))
    return where(chosen, np.logical_not), where(chosen, np.asarray)


def _groups(requests: Keyed, seed: int) -> Iterator[Records]:
    """All groups, in the order of their digests."""
    end = 0
    for part, groups in requests:
        found = np.zeros(len(groups), _GROUP)
        found["key"][:, 0] = [_drawn(seed, digest) for digest in part["key"][groups.first]]
        found["number"] = np.arange(end, end + len(groups))
        found["rows"] = groups.sizes()
        found["labels"] = sum(groups.having(part["label"] == label) << bit for bit, label in enumerate(_LABELS))
        end += len(groups)
        yield found


def _drawn(seed: int, digest: npt.NDArray[np.uint64]) -> int:
    """Depends on the seed and on the request alone: a new row moves no other to the other side."""
    drawn = hashlib.sha256(f"{seed}:{digest.tobytes().hex()}".encode()).digest()
    return int.from_bytes(drawn[:8], "big")


def _held_out(groups: Records, share: float) -> BoolArray:
    """Which groups are for validation."""
    held_out = row_array(len(groups), np.bool_)
    taken = _taken(_by_lot(groups), _Strata.of(pieces_of(groups), share))
    for number in taken:
        held_out[number] = True
    if not any(part.any() for part in pieces_of(held_out)):
        smallest = min(_smallest(piece) for piece in pieces_of(groups))
        held_out[smallest[-1]] = True
    return held_out


class _Strata:
    """For each set of labels, how many groups there are, and how many rows may still be taken."""

    def __init__(self, groups: dict[int, int], room: dict[int, int], share: float) -> None:
        self.groups, self.room = groups, room
        self._spared = 1 if share < 1 else 0

    @classmethod
    def of(cls, pieces: Iterable[Records], share: float) -> "_Strata":
        groups, rows = dict[int, int](), dict[int, int]()
        for piece in pieces:
            for labels in np.flatnonzero(np.bincount(piece["labels"])).tolist():
                members = piece["rows"][piece["labels"] == labels]
                groups[labels] = groups.get(labels, 0) + len(members)
                rows[labels] = rows.get(labels, 0) + int(members.sum())
        return cls(groups, {labels: round(share * count) for labels, count in rows.items()}, share)

    def takes(self, labels: int, rows: int) -> bool:
        """Whether a group, the next of its stratum, is for validation: not the last one, nor more than fit."""
        self.groups[labels] -= 1
        fits = rows <= self.room[labels] and self.groups[labels] >= self._spared
        self.room[labels] -= rows * fits
        return fits


def _taken(groups: Iterable[Records], strata: _Strata) -> Iterator[int]:
    """As near to the share as whole groups come without passing it (rounded to a row)."""
    for piece in groups:
        if not any(strata.room.values()):
            return
        columns = (piece[name].tolist() for name in ("number", "rows", "labels"))
        for number, rows, labels in zip(*columns, strict=True):
            if strata.takes(labels, rows):
                yield number


def _by_lot(groups: Records) -> Iterator[Records]:
    """The groups in the order that was drawn."""
    parts = Partition(lambda: pieces_of(groups), len(groups), _GROUP)
    return (part[np.argsort(part["key"][:, 0], kind="stable")] for part in parts)


def _smallest(groups: Records) -> tuple[int, int, int]:
    """Rows, lot and number of the smallest group; of several, the first by lot."""
    found = groups[np.lexsort((groups["key"][:, 0], groups["rows"]))[0]]
    return int(found["rows"]), int(found["key"][0]), int(found["number"])


def _choose(chosen: BoolArray, requests: Keyed, held_out: BoolArray) -> None:
    """Mark the rows of these groups."""
    end = 0
    for part, groups in requests:
        put(chosen, part["row"], held_out[end + groups.of_row])
        end += len(groups)
        release(held_out)

"""Training and validation rows from one set: by a seed, in the proportion of the labels, no prompt on both sides."""

import hashlib

import numpy as np
import numpy.typing as npt

from finetune.data.groups import Digests, Groups, Positions, group

_NAMES = {-1: "None", 0: "False", 1: "True"}


def split_rows(
    prompts: Digests, labels: npt.NDArray[np.int8], *, share: float, seed: int
) -> tuple[Positions, Positions]:
    """Positions of the training and of the validation rows, each in the order of the file.

    `prompts` [rows, 4] are the digests of the requests: rows with the same request stay together. `labels` are 1, 0 and
    -1 for none. Each label gives about `share` of its rows; with two requests or more, each side gets at least one row.
    """
    groups = group(prompts)
    if share <= 0 or len(groups) < 2:
        return np.arange(len(prompts)), np.empty(0, np.int64)
    held_out = np.zeros(len(groups), np.bool_)
    ranks, sizes = _ranks(prompts, groups, seed), groups.sizes()
    labels_of = sum(groups.having(labels == label) << bit for bit, label in enumerate(_NAMES))
    for stratum in np.unique(labels_of):
        members = np.flatnonzero(labels_of == stratum)
        members = members[np.argsort(ranks[members], kind="stable")]
        held_out[members[_take(sizes[members], share)]] = True
    if not held_out.any():
        smallest = np.lexsort((ranks, sizes))[0]
        held_out[smallest] = True
    chosen = held_out[groups.of_row]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _ranks(prompts: Digests, groups: Groups, seed: int) -> npt.NDArray[np.uint64]:
    """An order that depends on the seed and on each request alone: a new row moves no other to the other side."""
    ranks = np.empty(len(groups), np.uint64)
    for number, row in enumerate(groups.first):
        drawn = hashlib.sha256(f"{seed}:{prompts[row].tobytes().hex()}".encode()).digest()
        ranks[number] = int.from_bytes(drawn[:8], "big")
    return ranks


def _take(sizes: Positions, share: float) -> list[int]:
    """Which groups together come as near to the share as they can without passing it (rounded to a row)."""
    room = round(share * int(sizes.sum()))
    taken = []
    for number, size in enumerate((sizes[:-1] if share < 1 else sizes).tolist()):
        if size <= room:
            taken.append(number)
            room -= size
        if not room:
            break
    return taken

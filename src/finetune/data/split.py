"""Training and validation rows from one set: by a seed, in the proportion of the labels, no prompt on both sides."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from finetune.data.checks import prompt_key
from finetune.data.rows import Example

_Group = tuple[str, list[int]]


def split_examples(examples: Sequence[Example], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions of the training and of the validation rows, each in the order of the file.

    Rows with the same request stay together. Each label gives about `share` of its rows; with two requests or
    more, each side gets at least one row.
    """
    groups = _groups(examples)
    if share <= 0 or len(groups) < 2:
        return list(range(len(examples))), []
    strata: dict[tuple[str, ...], list[_Group]] = defaultdict(list)
    for key, positions in groups.items():
        labels = tuple(sorted({str(examples[position].desirable) for position in positions}))
        strata[labels].append((key, positions))
    chosen = {
        position
        for labels in sorted(strata)
        for _, positions in _take(_shuffled(strata[labels], seed), share)
        for position in positions
    }
    if not chosen:
        smallest = min(_shuffled(list(groups.items()), seed), key=lambda group: len(group[1]))
        chosen = set(smallest[1])
    return [p for p in range(len(examples)) if p not in chosen], sorted(chosen)


def _groups(examples: Sequence[Example]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for position, example in enumerate(examples):
        groups[prompt_key(example)].append(position)
    return groups


def _shuffled(groups: Sequence[_Group], seed: int) -> list[_Group]:
    """An order that depends on the seed and on each request alone: a new row moves no other to the other side."""
    return sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group[0]}".encode()).digest())


def _take(groups: Sequence[_Group], share: float) -> list[_Group]:
    """Groups that together come as near to the share as they can without passing it (rounded to a row)."""
    room = round(share * sum(len(positions) for _, positions in groups))
    taken = []
    for group in groups[: len(groups) - 1] if share < 1 else groups:
        if len(group[1]) <= room:
            taken.append(group)
            room -= len(group[1])
    return taken

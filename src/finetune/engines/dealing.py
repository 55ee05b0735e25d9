"""How the documents of a step are dealt out to graphs that are computed side by side."""

from collections.abc import Iterator, Sequence


def calls_of_each(lengths: Sequence[int], *, workers: int, share: int) -> list[list[list[int]]]:
    """For each worker its calls of the model, one after the other; for each call the numbers of its documents.

    A call has at most the tokens of the longest document, or a worker's `share` of the largest micro-batch.
    """
    most = max(share, *lengths)
    return [list(_fitting(hand, lengths, most)) for hand in deal(lengths, workers)]


def _fitting(numbers: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut into groups of at most `most` tokens."""
    group: list[int] = []
    for number in numbers:
        if group and sum(lengths[other] for other in group) + lengths[number] > most:
            yield group
            group = []
        group.append(number)
    yield group


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of `sizes` in at most `hands` lists of nearly equal sums: the largest first, each to the least so far."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        hand = sums.index(min(sums))
        dealt[hand].append(index)
        sums[hand] += sizes[index]
    return [hand for hand in dealt if hand]

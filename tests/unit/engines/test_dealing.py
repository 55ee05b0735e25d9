"""How a step's documents are dealt out to graphs that are computed side by side."""

from finetune.engines.dealing import calls_of_each, deal


def test_sizes_are_dealt_evenly() -> None:
    assert deal([5, 9, 1, 4, 3], 2) == [[1, 4], [0, 3, 2]]  # sums 12 and 10
    assert deal([7], 3) == [[0]]


def test_a_call_has_no_more_than_a_share_or_the_longest_document() -> None:
    assert calls_of_each([300, 300, 300], workers=2, share=450) == [[[0], [2]], [[1]]]
    assert calls_of_each([100, 90, 80, 70], workers=2, share=170) == [[[0, 3]], [[1, 2]]]
    assert calls_of_each([200, 10, 10, 10], workers=2, share=115) == [[[0]], [[1, 2, 3]]]

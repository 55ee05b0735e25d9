"""Figures that say how good a model is, as pure functions."""

import math


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token; infinity where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether the whole answer is the expected one; white space around them does not count."""
    return answer.strip() == expected.strip()

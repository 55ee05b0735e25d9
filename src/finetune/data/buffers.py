"""Small arrays of many sizes, of which no memory stays behind."""

import numpy as np

from finetune.core.types import BoolArray, IntArray

_KEPT = 1_024  # NumPy keeps seven freed pieces of every size below so many bytes, which would come to megabytes


def empty_mask(count: int) -> BoolArray:
    """np.empty [count]."""
    return np.empty(count + -count % _KEPT, np.bool_)[:count]


def empty_ints(count: int) -> IntArray:
    """np.empty [count] of int32."""
    return np.empty(count + -count % (_KEPT // 4), np.int32)[:count]

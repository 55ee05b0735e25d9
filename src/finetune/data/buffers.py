"""Small arrays of many sizes, of which no memory stays behind."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)

_KEPT = 1_024  # NumPy keeps seven freed pieces of every size below so many bytes, which would come to megabytes


def empty(count: int, dtype: type[Scalar]) -> npt.NDArray[Scalar]:
    """np.empty [count]."""
    return np.empty(count + -count % (_KEPT // np.dtype(dtype).itemsize), dtype)[:count]


def joined(*parts: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """np.concatenate of parts of one type."""
    return np.concatenate(parts, out=empty(sum(map(len, parts)), parts[0].dtype.type))

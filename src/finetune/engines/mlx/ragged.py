"""Keys and values of rows of different lengths, which decode together and join and leave at any time.

The newest tokens of all rows lie in one column, so a step writes one column for all rows, and a window of the last
tokens is the last columns:

    row 0    . . a b c d            (. is never seen)
    row 1    e f g h i j            the next token of every row goes into the next column
    row 2    . . . . k l

A row that joins is written beside the others, the last row moves into the place of one that leaves, and columns that
no row needs any more are dropped when room for new ones is made: no step copies what it does not change.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from finetune.core.types import BoolArray
from finetune.engines.mlx.documents import Documents


class RowLengths:
    """How many tokens each row has read, the same for all layers.

    Rows that read parts of different lengths side by side have `padding` in front of the shorter ones.
    """

    def __init__(self, lengths: list[int], padding: Sequence[int] = ()) -> None:
        self._lengths = lengths
        self._padding = np.array(padding if any(padding) else [0])
        self._changed()

    def _changed(self) -> None:
        self.longest = max(self._lengths, default=0)
        self.equal = min(self._lengths, default=0) == self.longest and not self._padding.any()
        self.offset: Any = self.longest if self.equal else mx.array(self._lengths - self._padding, mx.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, row: int) -> int:
        return self._lengths[row]

    def advance(self, tokens: int) -> None:
        """Every row has read some more."""
        self._lengths = [length + tokens for length in self._lengths]
        self._changed()

    def join(self, length: int) -> None:
        """One more row."""
        self._lengths.append(length)
        self._changed()

    def leave(self, row: int) -> None:
        """The last row takes the place of another."""
        self._lengths[row] = self._lengths[-1]
        self._lengths.pop()
        self._changed()

    def visible(self, columns: int) -> Any | None:
        """[B, 1, 1, columns], True where one new token of each row sees a column; None where it sees them all."""
        if self.equal or min(self._lengths) + 1 >= columns:
            return None
        first = columns - 1 - np.array(self._lengths)
        return mx.array(np.arange(columns)[None] >= first[:, None])[:, None, None]

    def side_by_side(self, length: int, window: int | None) -> Any:
        """[B, 1, length, longest + length], what tokens see: the row's past, and those between it and them.

        A query in the padding sees itself: what it computes must be finite. Rows with a past fit into the window.
        """
        columns = np.arange(self.longest + length)
        past, part = self.longest - np.array(self._lengths)[:, None], self.longest + self._padding[:, None]
        real = (columns >= past) & ((columns < self.longest) | (columns >= part))
        own = np.eye(length, len(columns), self.longest, dtype=bool)
        return mx.array(_seen(length, len(columns), window) & real[:, None] | own)[:, None]


class LayerCache:
    """One layer's keys and values. Stands in for mlx-lm's cache, which models ask for offsets, masks and keys.

    `columns` is how many columns room is made for at once: none beyond what is written for a row that reads. With
    `early` the device computes what is known up to this layer while Python goes through the layers behind it.
    """

    def __init__(self, rows: RowLengths, window: int | None, *, columns: int = 0, early: bool = False) -> None:
        self.rows = rows
        self.window = window
        self._columns = columns
        self._early = early
        self._keys: Any = None  # [slots, heads, room, width]
        self._values: Any = None
        self._end = 0  # columns in use
        self.newest_key: Any = None  # of every row, when each has added one

    @property
    def offset(self) -> Any:
        """Called by mlx-lm: the position of the next token, one for all rows or [B]."""
        return self.rows.offset

    @property
    def longest(self) -> int:
        """Tokens that the longest row has read."""
        return self.rows.longest

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def kept(self) -> int:
        """Columns that the next token of the longest row may see."""
        return self.longest if self.window is None else min(self.longest, self.window - 1)

    def positions(self, length: int) -> Any:
        """[B, length], for models that learn an embedding of each position."""
        offset: Any = mx.array(self.offset, mx.int32).reshape(-1, 1)
        return mx.maximum(offset + mx.arange(length), 0)  # padding has none

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None) -> Any:
        """Called by mlx-lm: what the next `length` tokens see."""
        seen = self.longest + length
        columns = seen if window_size is None else min(seen, window_size - 1 + length)
        if length == 1:
            return self.rows.visible(columns)
        if not self.rows.equal:
            return self.rows.side_by_side(length, window_size)
        if self.longest == 0 and not return_array:
            return Documents((length,), window_size)
        if columns == seen and (window_size is None or seen <= window_size) and not return_array:
            return "causal"
        return mx.array(_seen(length, columns, window_size))

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Called by mlx-lm: add columns [B, heads, N, width], and give those that the new tokens may see."""
        rows, _, length, _ = keys.shape
        columns = self.kept + length
        self.newest_key = keys if length == 1 else None
        if self._early:
            mx.async_eval(keys)  # type: ignore[no-untyped-call]
        if self._keys is None:
            self._keys, self._values = self._roomy(keys), self._roomy(values)
            self._end = length
        elif self._end + length > self._keys.shape[2]:
            self._append(keys, values)
        else:
            new = slice(self._end, self._end + length)
            self._keys[:rows, :, new], self._values[:rows, :, new] = keys, values
            self._end += length
        seen = slice(self._end - columns, self._end)
        return self._keys[:rows, :, seen], self._values[:rows, :, seen]

    def _append(self, keys: Any, values: Any) -> None:
        """Make room: only the columns that are still needed stay."""
        needed = slice(self._end - self.kept, self._end)
        rows = len(keys)
        self._keys = self._roomy(mx.concatenate([self._keys[:rows, :, needed], keys], axis=2))
        self._values = self._roomy(mx.concatenate([self._values[:rows, :, needed], values], axis=2))
        self._end = self.kept + keys.shape[2]

    def _roomy(self, array: Any) -> Any:
        return mx.pad(array, [(0, 0), (0, 0), (0, self._columns), (0, 0)]) if self._columns else array

    def join(self, row: "LayerCache") -> None:
        """Copy the one row of another cache behind the rows of this one, whose `rows` do not count it yet."""
        arrays, columns, slot = row.last(0), max(self.kept, row.kept), len(self.rows)
        if self._keys is None and arrays:  # none of the rows before it has read anything
            keys, values = (mx.pad(array, [(slot, 0), (0, 0), (0, 0), (0, 0)]) for array in arrays)
            self._keys, self._values, self._end = self._roomy(keys), self._roomy(values), columns
        elif self._keys is not None:
            self._reserve(slot + 1, columns)
            empty = [array[:1, :, :0] for array in self.arrays()]
            for array, new in zip(self.arrays(), arrays or empty, strict=True):
                begin = self._end - new.shape[2]
                array[slot, :, self._end - columns : begin] = 0.0  # no old value: 0 times NaN would be seen
                array[slot, :, begin : self._end] = new[0]

    def _reserve(self, slots: int, columns: int) -> None:
        """Room for so many rows, and for rows that have so many columns behind them."""
        more = max(0, columns - self._end)
        slots = len(self._keys) if slots > len(self._keys) else 0  # twice as many, or none
        if more or slots:
            padding = [(0, slots), (0, 0), (more, 0), (0, 0)]
            self._keys, self._values = mx.pad(self._keys, padding), mx.pad(self._values, padding)
            self._end += more

    def leave(self, row: int) -> None:
        """Move the last row into the place of another; `rows` still counts both."""
        last = len(self.rows) - 1
        if last == 0:
            self._keys = self._values = None
            self._end = 0
        elif row != last:
            for array in self.arrays():
                array[row] = array[last]

    def arrays(self) -> list[Any]:
        """Keys and values, where there are any."""
        return [] if self._keys is None else [self._keys, self._values]

    def last(self, row: int) -> list[Any]:
        """Keys and values [1, heads, kept, width] of a row that its next token may see; none before it has read any."""
        kept = self.rows[row] if self.window is None else min(self.rows[row], self.window - 1)
        return [array[row : row + 1, :, self._end - kept : self._end] for array in self.arrays()]

    def begin_with(self, rows: "Sequence[LayerCache]") -> None:
        """Lay the pasts of several rows side by side, ending together."""
        columns = max(row.kept for row in rows)
        pasts = [[_padded(array, columns) for array in row.last(0)] for row in rows if row.arrays()]
        if pasts:
            empty = [mx.zeros_like(array) for array in pasts[0]]
            found = iter(pasts)
            both = zip(*(next(found) if row.arrays() else empty for row in rows), strict=True)
            self._keys, self._values = (mx.concatenate(list(arrays)) for arrays in both)
            self._end = columns

    def take(self, other: "LayerCache", row: int, length: int) -> None:
        """Add the last `length` columns of one of the rows that another cache has read side by side."""
        keys, values = (mx.contiguous(array[row : row + 1, :, -length:]) for array in other.arrays())
        if self._keys is None:
            self._keys, self._values, self._end = keys, values, length
        else:
            self._append(keys, values)

    def copied(self, row: int, rows: RowLengths, *, dropped: int = 0, early: bool = False) -> "LayerCache":
        """A cache of one row, without its last `dropped` tokens."""
        copy = LayerCache(rows, self.window, early=early)
        if arrays := self.last(row):
            copy._end = arrays[0].shape[2] - dropped
            copy._keys, copy._values = (mx.contiguous(array[:, :, : copy._end]) for array in arrays)
        return copy


def _padded(array: Any, columns: int) -> Any:
    """Keys or values [1, heads, N, width] behind empty columns."""
    return mx.pad(array, [(0, 0), (0, 0), (columns - array.shape[2], 0), (0, 0)])


def _seen(length: int, columns: int, window: int | None) -> BoolArray:
    """[length, columns], True where a query sees a key; the last of both are the same token."""
    distance = (columns - length + np.arange(length))[:, None] - np.arange(columns)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)

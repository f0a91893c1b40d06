"""`Copies`: where the copies of every row are, without listing them.

The copies of row `j` have the numbers `starts[t] + depth[j]`, for `first[j] <= t < last[j]`; see `leaf_paths`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Copies"]


class Copies(NamedTuple):
    """Where the copies of every row are."""

    first: Tensor
    """`[M]` int32, the first path that holds the row."""
    last: Tensor
    """`[M]` int32, one past the last."""
    starts: Tensor
    """`[R]` int32 or more, number of the first copy of every path."""
    depth: Tensor
    """`[M]` int32, place of the row on all of them."""

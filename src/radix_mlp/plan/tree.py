"""What follows from `end`: parents, depths. Numba is imported with the first use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["depths", "parents"]


def parents(end: NDArray[np.int32], num_compact: int) -> NDArray[np.int32]:
    """`[M]` parent row of every row, -1 for roots and padding."""
    result = np.full(len(end), -1, np.int32)
    stack: list[int] = []
    for row in range(num_compact):
        while stack and end[stack[-1]] <= row:
            stack.pop()
        if stack:
            result[row] = stack[-1]
        stack.append(row)
    return result


def depths(end: NDArray[np.int32], num_compact: int) -> NDArray[np.int32]:
    """`[M]` number of ancestors of every row, 0 for padding."""
    result = np.zeros(len(end), np.int32)
    parent = parents(end, num_compact)
    for row in range(num_compact):
        if parent[row] >= 0:
            result[row] = result[parent[row]] + 1
    return result

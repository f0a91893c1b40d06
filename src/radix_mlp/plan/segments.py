"""Segments: the unbranched pieces of a tree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.compiled import compiled
from radix_mlp.plan.read_only import read_only

__all__ = ["Segments", "make_segments"]

Int32 = NDArray[np.int32]


class Segments(NamedTuple):
    """`G` segments that cover the rows in order: every row but the last of a segment has one child, the next row.

    The subtrees of all rows of a segment end at the same row, so a segment is a stretch of equal `RadixPlan.end`.
    A parent segment precedes its children. Each padding row is a segment of its own.
    """

    start: Int32
    """`[G]` first row."""
    end: Int32
    """`[G]` one past the last row."""
    parent: Int32
    """`[G]` the parent segment, whose last row is the parent of the first row; -1 for roots and padding."""


def make_segments(end: Int32) -> Segments:
    """Segments of a tree from `end` (`[M]` int32), in `O(M)`.

    Example: `a b c d | a b e` has the rows `a b c d e`.
        >>> segments = make_segments(np.array([5, 5, 4, 4, 5], np.int32))
        >>> segments.start.tolist(), segments.end.tolist(), segments.parent.tolist()
        ([0, 2, 4], [2, 4, 5], [-1, 0, 0])
    """
    start, parent = np.empty(len(end), np.int32), np.empty(len(end), np.int32)
    count = compiled(_find)(read_only(end), start, parent)
    stop = np.append(start[1:count], np.int32(len(end)))[:count]
    segments = Segments(start[:count].copy(), stop, parent[:count].copy())
    for array in segments:
        array.flags.writeable = False
    return segments


def _find(end: Int32, start: Int32, parent: Int32) -> int:
    """Write `start` and `parent`; returns the number of segments."""
    # segments on the path to the current row, the lowest last
    path = np.empty(len(end), np.int32)
    height = 0
    count = 0
    for row in range(len(end)):
        if row > 0 and end[row] == end[row - 1]:
            continue
        while height > 0 and end[start[path[height - 1]]] <= row:
            height -= 1
        start[count] = row
        parent[count] = path[height - 1] if height > 0 else -1
        path[height] = count
        height += 1
        count += 1
    return count

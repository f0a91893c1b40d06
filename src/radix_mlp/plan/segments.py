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

    A subtree of one segment ends where the subtrees of all its rows end, so a segment is a stretch of equal
    `RadixPlan.end`. A segment above comes before all segments below it. Rows of padding are segments of one row.
    """

    start: Int32
    """`[G]` first row."""
    end: Int32
    """`[G]` one past the last row."""
    parent: Int32
    """`[G]` the segment that the first row's parent ends, -1 for roots and padding."""


def make_segments(end: Int32) -> Segments:
    """Segments of a tree from `end` (`[M]` int32), in `O(M)`.

    Example: `a b c d | a b e` lies as `a b c d e`.
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
    # segments on the path to the row at hand, the lowest last
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

"""Query tiles and the key ranges that each can see, made once per batch for all layers.

The keys that any row of the tile `[start, stop)` can see are the root path of `start` and the tile itself, and a
root path is a handful of ranges of rows.  So two neighbours merge into one tile with the ranges of the first.
Tiles are packed into one flat int32 array of records:

    start, stop, min_depth, max_depth, num_ranges, (range_start, range_stop, range_depth) * num_ranges

`range_depth` is the depth of the first row of the range, and depths grow by one per row: so the keys that the whole
tile sees are those with a depth below `min_depth`.  Short gaps between ranges are closed to keep them few; such a
range has `-1 - depth` in the place of its depth, and the rows in its gaps have `end <= start`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.compiled import compiled

__all__ = ["Tile", "pack_tiles", "unpack_tiles"]

TILE_ROWS = 64
"""Most rows in a tile."""
MAX_GAP = 16
"""Gaps between key ranges up to this many rows are closed."""

_HEADER = 5


class Tile(NamedTuple):
    """Rows `[start, stop)` and the ranges `(start, stop, depth)` of earlier rows they can see."""

    start: int
    stop: int
    min_depth: int
    max_depth: int
    ranges: list[tuple[int, int, int]]


def pack_tiles(end: NDArray[np.int32], depth: NDArray[np.int32]) -> NDArray[np.int32]:
    """Tiles of a tree, packed: `end` and `depth` are `[M]` int32.

    >>> list(unpack_tiles(pack_tiles(np.array([3, 2, 3], np.int32), np.array([0, 1, 1], np.int32)).tolist()))
    [Tile(start=0, stop=3, min_depth=0, max_depth=1, ranges=[])]
    """
    tiles: NDArray[np.int32] = compiled(_pack_tiles)(end, depth, TILE_ROWS, MAX_GAP)
    return tiles


def unpack_tiles(packed: list[int]) -> Iterator[Tile]:
    """The records of `pack_tiles`, in row order."""
    at = 0
    while at < len(packed):
        start, stop, min_depth, max_depth, num_ranges = packed[at : at + _HEADER]
        at += _HEADER
        numbers = packed[at : at + 3 * num_ranges]
        at += 3 * num_ranges
        ranges = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        yield Tile(start, stop, min_depth, max_depth, ranges)


def _pack_tiles(end: NDArray[np.int32], depth: NDArray[np.int32], tile_rows: int, max_gap: int) -> NDArray[np.int32]:
    num_rows = len(end)
    # the root path of the row at hand: a stack of ranges of consecutive rows
    path_start, path_stop = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    height = 0
    packed = np.empty(64 + num_rows // 4, np.int32)
    used = 0
    header = 0
    start, stop = 0, 0
    for row in range(num_rows):
        while height and end[path_stop[height - 1] - 1] <= row:
            path_stop[height - 1] -= 1
            if path_stop[height - 1] == path_start[height - 1]:
                height -= 1

        if row == stop:
            start, stop = row, min(row + tile_rows, num_rows)
            # end with the last leaf of the second half: the next tile then starts with a short root path
            for last in range(stop - 1, start + tile_rows // 2 - 2, -1):
                if end[last] == last + 1:
                    stop = last + 1
                    break
            header = used
            used += 5
            if used + 3 * height > len(packed):
                grown = np.empty(2 * (used + 3 * height), np.int32)
                grown[:header] = packed[:header]
                packed = grown
            num_ranges = 0
            for i in range(height):
                if num_ranges and path_start[i] - packed[used - 2] <= max_gap:
                    packed[used - 2] = path_stop[i]
                    packed[used - 1] = min(packed[used - 1], -1 - packed[used - 1])
                else:
                    packed[used], packed[used + 1] = path_start[i], path_stop[i]
                    packed[used + 2] = depth[path_start[i]]
                    used += 3
                    num_ranges += 1
            packed[header], packed[header + 1], packed[header + 4] = start, stop, num_ranges
            packed[header + 2], packed[header + 3] = depth[row], depth[row]

        packed[header + 2] = min(packed[header + 2], depth[row])
        packed[header + 3] = max(packed[header + 3], depth[row])
        if height and path_stop[height - 1] == row:
            path_stop[height - 1] = row + 1
        else:
            path_start[height], path_stop[height] = row, row + 1
            height += 1
    return packed[:used].copy()

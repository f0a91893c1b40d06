"""Query tiles and the key ranges each of them can see: made once a batch, serving every layer.

The keys that any row of the tile `[start, stop)` can see are the root path of `start` and the tile itself, and a
root path is a handful of ranges of rows.  Tiles are packed into one flat int32 array of records:

    start, stop, causal, min_depth, num_ranges, (range_start, range_stop, depth of range_start) * num_ranges

`causal` is 1 when the tile has no root path and its rows are one path: plain causal attention, and such a tile may be
long.  `min_depth` is the smallest depth in the tile.  Ranges do not include the tile.  They may cover a few rows off
the root path (short gaps are closed to keep ranges few): those have `end <= start`, so the mask excludes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["TILE_ROWS", "Tile", "pack_tiles", "unpack_tiles"]

TILE_ROWS = 128
"""Most rows in a tile, causal tiles excepted."""
MIN_CAUSAL_ROWS = 64
"""Shorter paths at a root share a tile with what follows."""
MAX_GAP = 16
"""Gaps between key ranges up to this many rows are closed."""

_HEADER = 5


class Tile(NamedTuple):
    """Rows `[start, stop)` and the ranges of earlier rows they can see."""

    start: int
    stop: int
    causal: bool
    min_depth: int
    ranges: list[tuple[int, int, int]]


def pack_tiles(end: NDArray[np.int32], depth: NDArray[np.int32]) -> NDArray[np.int32]:
    """Tiles of a tree, packed: `end` and `depth` are `[M]` int32.

    >>> list(unpack_tiles(pack_tiles(np.array([3, 2, 3], np.int32), np.array([0, 1, 1], np.int32)).tolist()))
    [Tile(start=0, stop=3, causal=False, min_depth=0, ranges=[])]
    """
    return _compiled()(end, depth, TILE_ROWS, MIN_CAUSAL_ROWS, MAX_GAP)


def unpack_tiles(packed: list[int]) -> Iterator[Tile]:
    """The records of `pack_tiles`, in row order."""
    at = 0
    while at < len(packed):
        start, stop, causal, min_depth, num_ranges = packed[at : at + _HEADER]
        at += _HEADER
        ranges = [(packed[i], packed[i + 1], packed[i + 2]) for i in range(at, at + 3 * num_ranges, 3)]
        at += 3 * num_ranges
        yield Tile(start, stop, bool(causal), min_depth, ranges)


@cache
def _compiled() -> Callable[..., NDArray[np.int32]]:
    import numba

    return numba.njit(cache=True)(_pack_tiles)


def _pack_tiles(
    end: NDArray[np.int32], depth: NDArray[np.int32], tile_rows: int, min_causal: int, max_gap: int
) -> NDArray[np.int32]:
    num_rows = len(end)
    # the root path of the row at hand, as ranges of consecutive rows: a stack
    path_start, path_stop = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    height = 0
    packed, used = np.empty(64 + num_rows // 4, np.int32), 0
    start = 0
    while start < num_rows:
        while height and end[path_stop[height - 1] - 1] <= start:
            path_stop[height - 1] -= 1
            if path_stop[height - 1] == path_start[height - 1]:
                height -= 1

        leaf = start
        if height == 0:
            while leaf < num_rows - 1 and end[leaf] != leaf + 1:
                leaf += 1
        causal = height == 0 and leaf + 1 - start >= min_causal
        if causal:
            stop = leaf + 1
        else:
            stop = min(start + tile_rows, num_rows)
            # end at the last leaf of the tile's second half, so that the next tile starts with a short root path
            for row in range(stop - 1, start + tile_rows // 2 - 2, -1):
                if end[row] == row + 1:
                    stop = row + 1
                    break

        needed = used + 5 + 3 * height
        if needed > len(packed):
            grown = np.empty(2 * needed, np.int32)
            grown[:used] = packed[:used]
            packed = grown
        header = used
        used += 5
        num_ranges = 0
        for i in range(height):
            if num_ranges and path_start[i] - packed[used - 2] <= max_gap:
                packed[used - 2] = path_stop[i]
            else:
                packed[used], packed[used + 1], packed[used + 2] = path_start[i], path_stop[i], depth[path_start[i]]
                used += 3
                num_ranges += 1
        min_depth = depth[start]
        for row in range(start, stop):
            min_depth = min(min_depth, depth[row])
            while height and end[path_stop[height - 1] - 1] <= row:
                path_stop[height - 1] -= 1
                if path_stop[height - 1] == path_start[height - 1]:
                    height -= 1
            if height and path_stop[height - 1] == row:
                path_stop[height - 1] = row + 1
            else:
                path_start[height], path_stop[height] = row, row + 1
                height += 1
        packed[header], packed[header + 1], packed[header + 2] = start, stop, causal
        packed[header + 3], packed[header + 4] = min_depth, num_ranges
        start = stop
    return packed[:used].copy()

"""The tree as small integer tables for the tree kernels, made once per batch.

Forward: the keys that a query row sees lie on its root path, and a root path is a chain of *ranges* of rows.
Ranges form a tree of their own (one per segment, linked to the range above), so the table has one line per segment,
whatever the tile sizes, head counts and windows of the kernels that read it.

Backward: the queries that see one block of keys form one interval (pieces of it under a window); work items cut
these intervals into chunks of about equal length, so that a prefix seen by every row does not run on one core.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.compiled import compiled

__all__ = [
    "KEY_BLOCK",
    "ORDER_ROWS",
    "BackwardItems",
    "Places",
    "RangeTree",
    "TableSizes",
    "backward_items",
    "fill_forward_tables",
    "pack_tables",
    "places",
    "range_tree",
    "size_of_forward_tables",
]

Int32 = NDArray[np.int32]

ORDER_ROWS = 128
"""Rows per line of `RangeTree.order`; tiles of the forward kernels divide it."""
KEY_BLOCK = 128
"""Key rows a backward work item belongs to; key blocks of the backward kernel divide it."""
_GRANULE = 64
_MERGE_ROWS = 64
_MERGE_GAP = 32
_TARGET_ITEMS = 128
_MIN_CHUNK = 256


class RangeTree(NamedTuple):
    """Root paths as chains of row ranges: what the forward and the dQ kernel walk."""

    range_of_row: Int32
    """`[M]` row -> line of `ranges` whose rows end with it."""
    ranges: Int32
    """`[R, 4]` first row; one past the last row; `end` of the last row if every row lies on its path, else 0;
    line of the range above or -1."""
    order: Int32
    """`[ceil(M / ORDER_ROWS)]` groups of `ORDER_ROWS` rows, longest root path first."""


class BackwardItems(NamedTuple):
    """Work of the dK/dV kernel: each item is a block of `KEY_BLOCK` keys and a chunk of the queries seeing them."""

    items: Int32
    """`[I, 4]` key block; first query row; one past the last; slot of a partial sum, or -1 if the only chunk."""
    blocks: Int32
    """`[B, 2]` smallest and largest `end` of the block's keys."""
    splits: Int32
    """`[P, 3]` key block that has several chunks; its first slot; one past its last slot."""
    slots: Int32
    """`[num_slots]` key block of every slot."""


class TableSizes(NamedTuple):
    """The sizes of the tables in one vector that do not follow from `M`."""

    num_ranges: int
    """Lines of `ranges`."""
    num_items: int
    """Lines of `items`; 0 if the tables of the backward pass were not made."""
    num_splits: int
    num_slots: int
    pairs: int
    """Query-key pairs of the tree that see each other."""


class Places(NamedTuple):
    """Where tables begin in the vector of `pack_tables`."""

    range_of_row: int
    ranges: int
    order: int
    items: int
    blocks: int
    splits: int
    slots: int


def range_tree(end: NDArray[np.int32], depth: NDArray[np.int32]) -> RangeTree:
    """Ranges of the root paths, in `O(M)`.

    Args:
        end: `[M]` int32, one past the last row of every row's subtree (`RadixPlan.end`).
        depth: `[M]` int32, number of ancestors (`RadixPlan.depth`).

    Example: `a b c | a b d | a e` lies as `a b c d e`; `a` is one range, `b` is merged with it (both are short).
        >>> import numpy as np
        >>> tree = range_tree(np.array([5, 4, 3, 4, 5], np.int32), np.array([0, 1, 2, 2, 1], np.int32))
        >>> tree.range_of_row.tolist()
        [0, 1, 2, 3, 4]
        >>> tree.ranges[1].tolist()
        [0, 2, 4, -1]
    """
    end, depth = _checked(end, depth)
    num_rows = len(end)
    vector = np.empty(size_of_forward_tables(num_rows), np.int32)
    num_ranges = fill_forward_tables(end, depth, vector)
    at = places(num_rows, num_rows)
    ranges = vector[at.ranges : at.order].reshape(-1, 4)[:num_ranges]
    return RangeTree(vector[: at.ranges], ranges, vector[at.order :])


def size_of_forward_tables(num_rows: int) -> int:
    """Numbers in the tables of the forward pass, with room for as many ranges as rows."""
    return places(num_rows, num_rows).items


def fill_forward_tables(end: Int32, depth: Int32, vector: Int32) -> int:
    """Write `RangeTree` as `pack_tables` does, with room for as many ranges as rows; returns how many there are."""
    at = places(len(end), len(end))
    ranges, order = vector[at.ranges : at.order].reshape(-1, 4), vector[at.order : at.items]
    count: int = compiled(_fill_ranges)(end, ranges, vector[: at.ranges])
    compiled(_fill_order)(depth, order)
    return count


def places(num_rows: int, num_ranges: int, num_items: int = 0, num_splits: int = 0) -> Places:
    """Where the tables of a tree begin: in the order of the fields of `RangeTree` and `BackwardItems`."""
    ranges = num_rows
    order = ranges + 4 * num_ranges
    items = order - (-num_rows // ORDER_ROWS)
    blocks = items + 4 * num_items
    splits = blocks - 2 * (-num_rows // KEY_BLOCK)
    return Places(0, ranges, order, items, blocks, splits, splits + 3 * num_splits)


def backward_items(end: NDArray[np.int32], depth: NDArray[np.int32], window: int | None = None) -> BackwardItems:
    """Key blocks and the chunks of queries that see them, in time proportional to what they hold.

    Args:
        end: `[M]` int32.
        depth: `[M]` int32.
        window: keys a query sees, itself included; None sees all.
    """
    end, depth = _checked(end, depth)
    num_blocks = -(-len(end) // KEY_BLOCK)
    cuts = np.arange(0, len(end), KEY_BLOCK)
    blocks = np.empty((num_blocks, 2), np.int32)
    if num_blocks:
        blocks[:, 0] = np.minimum.reduceat(end, cuts)
        blocks[:, 1] = np.maximum.reduceat(end, cuts)
    if window is None:
        pieces = np.stack([np.arange(num_blocks), cuts, blocks[:, 1]], axis=1).astype(np.int32)
    else:
        deepest = np.maximum.reduceat(depth, cuts) if num_blocks else np.zeros(0, np.int32)
        pieces = _window_pieces(blocks[:, 1], deepest.astype(np.int64) + window, depth)
    return _cut_pieces(pieces, blocks)


def pack_tables(
    end: NDArray[np.int32], depth: NDArray[np.int32], window: int | None = None, *, backward: bool = True
) -> tuple[Int32, TableSizes]:
    """All tables in one vector, int32, laid out as `places` says, and their sizes.

    Without `backward` those of `BackwardItems` are left out: the forward kernel does not read them.
    """
    tree = range_tree(end, depth)
    pairs = int(depth.sum(dtype=np.int64)) + len(depth)
    if not backward:
        return np.concatenate([table.ravel() for table in tree]), TableSizes(len(tree.ranges), 0, 0, 0, pairs)
    work = backward_items(end, depth, window)
    sizes = TableSizes(len(tree.ranges), len(work.items), len(work.splits), len(work.slots), pairs)
    return np.concatenate([table.ravel() for table in (*tree, *work)]), sizes


def _checked(end: NDArray[np.int32], depth: NDArray[np.int32]) -> tuple[Int32, Int32]:
    if end.shape != depth.shape or end.ndim != 1:
        raise InvalidInputError(f"end {end.shape} and depth {depth.shape} must be two vectors of M rows")
    return np.ascontiguousarray(end, np.int32), np.ascontiguousarray(depth, np.int32)


def _fill_ranges(end: Int32, ranges: Int32, range_of_row: Int32) -> int:
    """Write `ranges [>= R, 4]` and `range_of_row [M]`; returns the number of ranges `R`.

    One range a segment (a stretch of equal `end`). A short segment is merged into the ranges below it, to fill key
    blocks.
    """
    stack = np.empty(len(end) + 1, np.int32)
    height = line = stop = 0
    while stop < len(end):
        start = stop
        while stop < len(end) and end[stop] == end[start]:
            stop += 1
        while height and end[ranges[stack[height - 1], 1] - 1] <= start:
            height -= 1
        above = stack[height - 1] if height else -1
        first, visible, parent = start, end[start], above
        if above >= 0 and ranges[above, 1] - ranges[above, 0] <= _MERGE_ROWS:
            gap = start - ranges[above, 1]
            whole = gap == 0 and ranges[above, 2] > 0
            if whole or (gap <= _MERGE_GAP and stop - ranges[above, 0] <= 2 * _MERGE_ROWS):
                first, parent = ranges[above, 0], ranges[above, 3]
                visible = end[start] if whole else 0
        ranges[line, 0], ranges[line, 1], ranges[line, 2], ranges[line, 3] = first, stop, visible, parent
        range_of_row[start:stop] = line
        stack[height] = line
        height += 1
        line += 1
    return line


def _fill_order(depth: Int32, order: Int32) -> None:
    """Number the groups of `ORDER_ROWS` rows by the depth of their middle, deepest first."""
    shallow = np.empty(len(order), np.int32)
    for group in range(len(order)):
        shallow[group] = -depth[min(group * ORDER_ROWS + ORDER_ROWS // 2, len(depth) - 1)]
    order[:] = np.argsort(shallow, kind="mergesort")


def _window_pieces(last: Int32, limit: NDArray[np.int64], depth: Int32) -> Int32:
    """Per key block, the stretches of rows before `last` that hold a row of depth below `limit`."""
    num_granules = -(-len(depth) // _GRANULE)
    width = 1 << max(num_granules - 1, 0).bit_length()
    lowest = np.full(2 * width, np.iinfo(np.int32).max, np.int32)
    if num_granules:
        lowest[width : width + num_granules] = np.minimum.reduceat(depth, np.arange(0, len(depth), _GRANULE))
    for node in range(width - 1, 0, -1):
        lowest[node] = min(lowest[2 * node], lowest[2 * node + 1])
    find = compiled(_find_pieces)
    count = find(last, limit, lowest, width, np.empty((0, 3), np.int32))
    pieces = np.empty((count, 3), np.int32)
    find(last, limit, lowest, width, pieces)
    return pieces


def _find_pieces(last: Int32, limit: NDArray[np.int64], lowest: Int32, width: int, pieces: Int32) -> int:
    """Count the pieces, and write them if there is room. `lowest` is a tree of minima over `width` granules."""
    count = 0
    for block in range(len(last)):
        row = block * KEY_BLOCK
        while row < last[block]:
            node = width + row // _GRANULE
            while lowest[node] >= limit[block]:
                # climb until the neighbour to the right holds a low row, then go down to it
                while node & 1:
                    node >>= 1
                if node == 0:
                    break
                node += 1
                if lowest[node] < limit[block]:
                    while node < width:
                        node = 2 * node if lowest[2 * node] < limit[block] else 2 * node + 1
            if node == 0:
                break
            granule = node - width
            first = max(row, granule * _GRANULE)
            while granule < width and granule * _GRANULE < last[block] and lowest[width + granule] < limit[block]:
                granule += 1
            row = min(granule * _GRANULE, last[block])
            if first < row:
                if count < len(pieces):
                    pieces[count, 0], pieces[count, 1], pieces[count, 2] = block, first, row
                count += 1
    return count


def _cut_pieces(pieces: Int32, blocks: Int32) -> BackwardItems:
    """Cut into chunks of about equal length, give slots to the blocks that have several, longest first."""
    lengths = (pieces[:, 2] - pieces[:, 1]).astype(np.int64)
    chunk = max(_MIN_CHUNK, int(lengths.sum()) // _TARGET_ITEMS)
    parts = np.maximum(np.ceil(lengths / chunk).astype(np.int64), 1)
    piece = np.repeat(np.arange(len(pieces)), parts)
    part = np.arange(len(piece)) - np.repeat(np.cumsum(parts) - parts, parts)
    # equal parts, rounded to whole granules, rather than full chunks and a rest
    step = np.ceil(lengths / parts / _GRANULE).astype(np.int64) * _GRANULE
    first = pieces[piece, 1] + part * step[piece]
    stop = np.minimum(first + step[piece], pieces[piece, 2])
    kept = first < stop
    block, first, stop = pieces[piece, 0][kept], first[kept], stop[kept]
    chunks = np.bincount(block, minlength=len(blocks))
    split = chunks > 1
    is_split = split[block]
    slot = np.where(is_split, np.cumsum(is_split) - 1, -1)
    last_slot = np.cumsum(np.where(split, chunks, 0))
    splits = np.stack([np.arange(len(blocks)), last_slot - chunks, last_slot], axis=1)[split].astype(np.int32)
    items = np.stack([block, first, stop, slot], axis=1).astype(np.int32)
    items = items[np.argsort(first - stop, kind="stable")]
    return BackwardItems(items, blocks, splits, block[is_split].astype(np.int32))

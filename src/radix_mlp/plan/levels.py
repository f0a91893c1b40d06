"""Levels: the pieces of a tree in the order in which a recurrent state passes through them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.compiled import compiled
from radix_mlp.plan.read_only import read_only
from radix_mlp.plan.segments import Segments

__all__ = ["Levels", "make_levels"]

Int32 = NDArray[np.int32]


class Levels(NamedTuple):
    """`P` pieces of `T` rows. A piece starts from the state after its parent piece, so all pieces of a level can run
    together, after the level above.

    A piece is a segment, preceded by the rows of the segments right above it that are copied into their children
    (`make_levels`), so `T >= M`. Padding rows of the plan are in no piece.
    """

    rows: Int32
    """`[T]` the rows of all pieces, level by level and, within a level, in preorder."""
    start: Int32
    """`[P + 1]` where the rows of each piece start in `rows`."""
    parent: Int32
    """`[P]` the parent piece, which is one level above; -1 for roots. Children of a piece are consecutive."""
    first: Int32
    """`[L + 1]` the first piece of each level, then `P`."""


def make_levels(segments: Segments, num_compact: int, copied: NDArray[np.bool_] | None = None) -> Levels:
    """Levels of a tree, in `O(T + G)`.

    Args:
        segments: the `G` segments of the tree.
        num_compact: rows before the padding.
        copied: `[G]`, which segments to copy into each of their children instead of cutting below them. Ignored for
            segments without children. Copies save levels and short pieces; they cost rows.

    Example: `a b c d | a b e` has the rows `a b c d e`.
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([1, 2, 3, 4, 1, 2, 5], [0, 4, 7])
        >>> cut = make_levels(plan.segments, plan.num_compact)
        >>> cut.rows.tolist(), cut.start.tolist(), cut.parent.tolist(), cut.first.tolist()
        ([0, 1, 2, 3, 4], [0, 2, 4, 5], [-1, 0, 0], [0, 1, 3])
        >>> make_levels(plan.segments, plan.num_compact, np.array([True, False, False])).rows.tolist()
        [0, 1, 2, 3, 0, 1, 4]
    """
    count = int(np.searchsorted(segments.start, num_compact))
    flags = np.zeros(count, np.bool_) if copied is None else np.ascontiguousarray(copied[:count])
    start, end, parent = (read_only(array[:count]) for array in segments)
    arrays = compiled(_arrange)(start, end, parent, flags)
    for array in arrays:
        array.flags.writeable = False
    return Levels(*arrays)


def _arrange(start: Int32, end: Int32, parent: Int32, copied: NDArray[np.bool_]) -> tuple[Int32, Int32, Int32, Int32]:
    count = len(start)
    has_children = np.zeros(count, np.bool_)
    for segment in range(count):
        if parent[segment] >= 0:
            has_children[parent[segment]] = True

    # rows copied from above, and the level of the piece that ends with each segment
    carried = np.zeros(count, np.int64)
    level = np.zeros(count, np.int32)
    is_piece = np.empty(count, np.bool_)
    num_levels = 0
    for segment in range(count):
        above = parent[segment]
        if above >= 0 and is_piece[above]:
            level[segment] = level[above] + 1
        elif above >= 0:
            level[segment] = level[above]
            carried[segment] = carried[above] + end[above] - start[above]
        is_piece[segment] = not (copied[segment] and has_children[segment])
        if is_piece[segment]:
            num_levels = max(num_levels, level[segment] + 1)

    first = np.zeros(num_levels + 1, np.int32)
    for segment in range(count):
        if is_piece[segment]:
            first[level[segment] + 1] += 1
    for i in range(num_levels):
        first[i + 1] += first[i]

    # preorder within each level; parents come first in preorder, so their pieces are numbered already
    num_pieces = first[num_levels]
    piece = np.empty(count, np.int32)
    next_piece = first.copy()
    piece_start = np.zeros(num_pieces + 1, np.int32)
    piece_parent = np.full(num_pieces, -1, np.int32)
    for segment in range(count):
        above = parent[segment]
        if not is_piece[segment]:
            # stands for the piece that the children start from
            piece[segment] = piece[above] if above >= 0 else -1
            continue
        piece[segment] = next_piece[level[segment]]
        next_piece[level[segment]] += 1
        piece_start[piece[segment] + 1] = carried[segment] + end[segment] - start[segment]
        piece_parent[piece[segment]] = piece[above] if above >= 0 else -1
    for i in range(num_pieces):
        piece_start[i + 1] += piece_start[i]

    rows = np.empty(piece_start[num_pieces], np.int32)
    for segment in range(count):
        if not is_piece[segment]:
            continue
        # from the last row back, through the copied segments above
        at = piece_start[piece[segment] + 1]
        source = segment
        while True:
            for row in range(end[source] - 1, start[source] - 1, -1):
                at -= 1
                rows[at] = row
            source = parent[source]
            if source < 0 or is_piece[source]:
                break
    return rows, piece_start, piece_parent, first

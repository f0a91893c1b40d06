"""Which segments to copy into their children, so that a recurrence runs fewer levels and fewer short pieces."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.compiled import compiled
from radix_mlp.plan.read_only import read_only
from radix_mlp.plan.segments import Segments

__all__ = ["Copies", "choose_copies"]

Int32 = NDArray[np.int32]

# a copied row is moved and kept, but fills places of a chunk that would be empty
ROWS_FOR_A_CHUNK = 4
# how many chunks more than a cut a copy may cost; the first is for no copies at all, the last ones save levels
BONUSES = (-np.inf, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Copies(NamedTuple):
    """What `make_levels` takes, and what the levels will be."""

    copied: NDArray[np.bool_]
    """`[G]` whether a segment is copied into each of its children. The last ones, of padding rows, are not."""
    num_chunks: int
    """Whole chunks that the pieces need; no two pieces share one."""
    num_rows: int
    """Rows of all pieces."""
    num_levels: int


def choose_copies(segments: Segments, num_compact: int, chunk: int, level_cost: float = 0.0) -> Copies:
    """The cheapest of a few choices, in `O(G)`.

    The cost is one for each chunk of `chunk` rows, `level_cost` for each level, and a little for each row. Each choice
    goes through the tree from the roots and copies a segment, with what it carries, where that needs at most
    a given number of chunks more than cutting below it. So a comb, whose levels are as many as its sequences, gets few
    levels.

    Args:
        segments: the `G` segments of the tree.
        num_compact: rows before the padding.
        chunk: rows of a chunk.
        level_cost: in chunks. At 0, copies only save chunks.

    Example: four tokens, a whole chunk, then two continuations of one token, each with two ends of one token.
        >>> from radix_mlp.plan import build_plan
        >>> tokens = [[1, 1, 1, 1, a, b] for a in (2, 3) for b in (4, 5)]
        >>> plan = build_plan(np.concatenate(tokens), [0, 6, 12, 18, 24])
        >>> choose_copies(plan.segments, plan.num_compact, 4).copied.tolist()
        [False, True, False, False, True, False, False]
    """
    count = int(np.searchsorted(segments.start, num_compact))
    start, end, parent = (read_only(array[:count]) for array in segments)
    best: Copies | None = None
    lowest = np.inf
    for bonus in BONUSES if level_cost > 0 else BONUSES[:2]:
        copied = np.zeros(len(segments.start), np.bool_)
        found = Copies(copied, *compiled(_choose)(start, end, parent, chunk, bonus, copied))
        cost = found.num_chunks + found.num_rows / (ROWS_FOR_A_CHUNK * chunk) + level_cost * found.num_levels
        if best is None or cost < lowest:
            best, lowest = found, cost
    assert best is not None
    return best


def _choose(
    start: Int32, end: Int32, parent: Int32, chunk: int, bonus: float, copied: NDArray[np.bool_]
) -> tuple[int, int, int]:
    """Write `copied`; returns the numbers of chunks, rows and levels."""
    count = len(start)
    first_child = np.full(count, -1, np.int32)
    next_sibling = np.full(count, -1, np.int32)
    for segment in range(count - 1, -1, -1):
        above = parent[segment]
        if above >= 0:
            next_sibling[segment] = first_child[above]
            first_child[above] = segment

    # rows of the piece that ends with each segment
    length = np.empty(count, np.int64)
    level = np.empty(count, np.int32)
    num_chunks = 0
    num_rows = 0
    num_levels = 0
    for segment in range(count):
        above = parent[segment]
        length[segment] = end[segment] - start[segment]
        level[segment] = 0 if above < 0 else level[above]
        if above >= 0 and copied[above]:
            length[segment] += length[above]
        elif above >= 0:
            level[segment] += 1
        chunks = (length[segment] + chunk - 1) // chunk
        child = first_child[segment]
        if child >= 0:
            # what copying needs more than cutting
            more = -float(chunks) - length[segment] / (ROWS_FOR_A_CHUNK * chunk)
            while child >= 0:
                own = end[child] - start[child]
                more += (length[segment] + own + chunk - 1) // chunk - (own + chunk - 1) // chunk
                more += length[segment] / (ROWS_FOR_A_CHUNK * chunk)
                child = next_sibling[child]
            copied[segment] = more <= bonus
        if not copied[segment]:
            num_chunks += chunks
            num_rows += length[segment]
            num_levels = max(num_levels, level[segment] + 1)
    return num_chunks, num_rows, num_levels

"""Leaf paths: the root path of every leaf, with the tree's rows divided among them. Made once per batch.

In depth-first order the first child of a row is the next row.  So the rows after one leaf up to and including the next
are a path: each is the first child of the one before.  They are the *own rows* of leaf path `l`, which ends with leaf
`l`: they see the root path of that leaf, causal from the bottom right.  (A segment of `RadixPlan.segments` also ends
where the tree branches, so own rows are one or more whole segments.)

Gathering the keys of every leaf path copies `sum(depth[leaf] + 1)` rows: every leaf is the end of some
sequence, and no two are of one, so that is at most `N` (and one row for each row of padding).  Paths that follow the
heaviest child instead of the first copy as many, since they end in the same leaves, but are not consecutive rows.

Copies are found again without a list: the leaf paths that hold row `j` are those from the one that owns `j` to the one
that owns its last descendant, and the copy in path `l` is number `cu_keys[l] + depth[j]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.compiled import compiled
from radix_mlp.plan.read_only import read_only

__all__ = ["LeafPaths", "TreeStatistics", "leaf_paths", "shares", "tree_statistics", "unshared_paths"]

Int32 = NDArray[np.int32]

FLASH_ROWS = 128
"""Query rows of a tile of FlashAttention, which does not share tiles between leaf paths."""


class LeafPaths(NamedTuple):
    """`P` leaf paths over `M` rows and the `K` keys gathered for them."""

    cu_rows: Int32
    """`[P + 1]` first own row of every leaf path, and `M`."""
    cu_keys: Int32
    """`[P + 1]` first gathered key of every leaf path, and `K`."""
    path_of_row: Int32
    """`[M]` row -> the leaf path that owns it."""
    gather: Int32
    """`[K]` gathered key -> row; empty where it would be the rows themselves, since nothing is shared."""


class TreeStatistics(NamedTuple):
    """What the cost of attention depends on, all integers."""

    num_rows: int
    """`M`, padding included."""
    num_paths: int
    """`P`, leaf paths."""
    num_gathered: int
    """`K`, keys gathered along the leaf paths; `M` where nothing is shared."""
    most_own_rows: int
    """Own rows of a leaf path."""
    longest_path: int
    """Tokens from a root to a leaf."""
    pairs: int
    """Query-key pairs that see each other."""
    flash_pairs: int
    """Pairs in the tiles that FlashAttention computes for the leaf paths: `FLASH_ROWS` query rows each."""


def leaf_paths(end: Int32, depth: Int32) -> LeafPaths:
    """Leaf paths of a tree, `end` and `depth` are `[M]` int32, in `O(M + K)`.

    Example: `a b c | a b d | a e` lies as `a b c d e`, and the own rows of the paths are `a b c`, `d` and `e`.
        >>> paths = leaf_paths(np.array([5, 4, 3, 4, 5], np.int32), np.array([0, 1, 2, 2, 1], np.int32))
        >>> paths.cu_rows.tolist(), paths.cu_keys.tolist(), paths.gather.tolist()
        ([0, 3, 4, 5], [0, 3, 6, 8], [0, 1, 2, 0, 1, 3, 0, 4])
    """
    return _paths(*_scan(end, depth))


def unshared_paths(end: Int32, depth: Int32) -> tuple[LeafPaths | None, TreeStatistics]:
    """The statistics of a tree, and its leaf paths where nothing is shared, which costs nothing then; else None."""
    cu_rows, cu_keys, known = _scan(end, depth)
    return None if shares(known) else _paths(cu_rows, cu_keys, known), known


def _paths(cu_rows: Int32, cu_keys: Int32, known: TreeStatistics) -> LeafPaths:
    gather = np.empty(known.num_gathered if shares(known) else 0, np.int32)
    path_of_row = np.empty(known.num_rows, np.int32)
    compiled(_fill)(cu_rows, cu_keys, path_of_row, gather, np.empty(known.longest_path, np.int32))
    return LeafPaths(cu_rows, cu_keys, path_of_row, gather)


def shares(statistics: TreeStatistics) -> bool:
    """Whether any token is shared."""
    return statistics.num_gathered != statistics.num_rows


def tree_statistics(end: Int32, depth: Int32) -> TreeStatistics:
    """Statistics of a tree, `end` and `depth` are `[M]` int32: one pass that stops at leaves.

    >>> tree_statistics(np.array([5, 4, 3, 4, 5], np.int32), np.array([0, 1, 2, 2, 1], np.int32)).pairs
    11
    """
    return _scan(end, depth)[2]


def _scan(end: Int32, depth: Int32) -> tuple[Int32, Int32, TreeStatistics]:
    """`cu_rows`, `cu_keys` and the statistics."""
    if end.shape != depth.shape or end.ndim != 1:
        raise InvalidInputError(f"end {end.shape} and depth {depth.shape} must be two vectors of M rows")
    cu_rows, cu_keys = np.zeros(len(end) + 1, np.int32), np.zeros(len(end) + 1, np.int32)
    num_paths, *found = compiled(_find_leaves)(read_only(end), read_only(depth), cu_rows, cu_keys)
    num_gathered, most_own_rows, longest_path, pairs, flash_pairs = found
    known = TreeStatistics(len(end), num_paths, num_gathered, most_own_rows, longest_path, pairs, flash_pairs)
    if known.num_gathered > np.iinfo(np.int32).max:
        raise InvalidInputError(f"leaf paths of {known.num_gathered} tokens in one batch: there must be less than 2^31")
    return cu_rows[: num_paths + 1], cu_keys[: num_paths + 1], known


def _find_leaves(end: Int32, depth: Int32, cu_rows: Int32, cu_keys: Int32) -> tuple[int, int, int, int, int, int]:
    """Write the offsets of the leaf paths; returns `TreeStatistics` without its first field."""
    path, start, total = 0, 0, 0
    most_own_rows, longest_path, pairs, flash_pairs = 0, 0, 0, 0
    for row in range(len(end)):
        if end[row] != row + 1:
            continue
        rows, keys = row + 1 - start, int(depth[row]) + 1
        total += keys
        start = row + 1
        path += 1
        cu_rows[path], cu_keys[path] = start, total
        before = keys - rows
        tiles = (rows + FLASH_ROWS - 1) // FLASH_ROWS
        most_own_rows = max(most_own_rows, rows)
        longest_path = max(longest_path, keys)
        pairs += rows * before + rows * (rows + 1) // 2
        # all tiles but the last are full, and see the rows up to their own last one
        flash_pairs += FLASH_ROWS * (tiles * before + FLASH_ROWS * (tiles * (tiles - 1) // 2) + rows)
    return path, total, most_own_rows, longest_path, pairs, flash_pairs


def _fill(cu_rows: Int32, cu_keys: Int32, path_of_row: Int32, gather: Int32, path: Int32) -> None:
    for number in range(len(cu_rows) - 1):
        start, stop = cu_rows[number], cu_rows[number + 1]
        path_of_row[start:stop] = number
        if len(gather) == 0:
            continue
        first, last = cu_keys[number], cu_keys[number + 1]
        # the own rows replace the path below the row that it branches from
        shared = last - first - (stop - start)
        for i in range(stop - start):
            path[shared + i] = start + i
        gather[first:last] = path[: last - first]

"""Runs: the tree cut into paths, one a leaf, with the keys that each of them sees. Made once a batch.

In depth-first order the first child of a row is the next row.  So the rows after one leaf up to and including the next
are a path: each is the first child of the one before.  These are the runs; run `l` ends with leaf `l`, and its rows see
the root path of that leaf, causal from the bottom right.

Gathering the keys of every run along its root path copies `sum(depth[leaf] + 1)` rows: every leaf is the end of some
sequence, and no two are of one, so that is at most `N` (and one row for each row of padding).  Paths that follow the
heaviest child instead of the first copy as many, since they end in the same leaves, but are not consecutive rows.

Copies are found again without a list: the runs whose root path holds row `j` are those from the run of `j` to the run
of its last descendant, and the copy in run `l` is number `cu_keys[l] + depth[j]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.compiled import compiled

__all__ = ["Runs", "TreeStatistics", "make_runs", "pack_runs", "tree_statistics"]

Int32 = NDArray[np.int32]

FLASH_ROWS = 128
"""Query rows of a tile of FlashAttention, which does not share tiles between runs."""


class Runs(NamedTuple):
    """`R` runs over `M` rows and the `K` keys gathered for them."""

    cu_rows: Int32
    """`[R + 1]` first row of every run, and `M`."""
    cu_keys: Int32
    """`[R + 1]` first gathered key of every run, and `K`."""
    run_of_row: Int32
    """`[M]` row -> its run."""
    gather: Int32
    """`[K]` gathered key -> row; empty where it would be the rows themselves, since nothing is shared."""


class TreeStatistics(NamedTuple):
    """What the cost of attention depends on, all integers."""

    num_rows: int
    """`M`, padding included."""
    num_runs: int
    """`R`, paths to leaves."""
    num_gathered: int
    """`K`, keys gathered along the root paths of the runs; `M` where nothing is shared."""
    longest_run: int
    """Rows."""
    longest_path: int
    """Tokens from a root to a leaf."""
    pairs: int
    """Query-key pairs that see each other."""
    flash_pairs: int
    """Pairs in the tiles that FlashAttention computes for the runs: `FLASH_ROWS` query rows each."""


def make_runs(end: Int32, depth: Int32) -> Runs:
    """Runs of a tree, `end` and `depth` are `[M]` int32, in `O(M + K)`.

    Example: `a b c | a b d | a e` lies as `a b c d e`, and the runs are `a b c`, `d` and `e`.
        >>> runs = make_runs(np.array([5, 4, 3, 4, 5], np.int32), np.array([0, 1, 2, 2, 1], np.int32))
        >>> runs.cu_rows.tolist(), runs.cu_keys.tolist(), runs.gather.tolist()
        ([0, 3, 4, 5], [0, 3, 6, 8], [0, 1, 2, 0, 1, 3, 0, 4])
    """
    return _make(*_scan(end, depth))


def tree_statistics(end: Int32, depth: Int32) -> TreeStatistics:
    """Statistics of a tree, `end` and `depth` are `[M]` int32: one pass that stops at leaves.

    >>> tree_statistics(np.array([5, 4, 3, 4, 5], np.int32), np.array([0, 1, 2, 2, 1], np.int32)).pairs
    11
    """
    return TreeStatistics(*_scan(end, depth)[2].tolist())


def pack_runs(end: Int32, depth: Int32, *, always: bool = True) -> tuple[Int32, NDArray[np.int64]]:
    """Both in vectors: `Runs` in the order of its fields, int32, and `TreeStatistics`, `[7]` int64.

    Unless `always`, the runs are made only where nothing is shared, and are empty elsewhere.
    """
    cu_rows, cu_keys, statistics = _scan(end, depth)
    if not always and statistics[2] != statistics[0]:
        return np.zeros(0, np.int32), statistics
    return np.concatenate(_make(cu_rows, cu_keys, statistics)), statistics


def _scan(end: Int32, depth: Int32) -> tuple[Int32, Int32, NDArray[np.int64]]:
    """`cu_rows`, `cu_keys`, and the statistics in the order of their fields."""
    if end.shape != depth.shape or end.ndim != 1:
        raise InvalidInputError(f"end {end.shape} and depth {depth.shape} must be two vectors of M rows")
    cu_rows, cu_keys = np.zeros(len(end) + 1, np.int32), np.zeros(len(end) + 1, np.int32)
    statistics = np.zeros(len(TreeStatistics._fields), np.int64)
    num_runs = compiled(_find_leaves)(_read_only(end), _read_only(depth), cu_rows, cu_keys, statistics)
    known = TreeStatistics(*statistics.tolist())
    if known.num_gathered > np.iinfo(np.int32).max:
        raise InvalidInputError(f"root paths of {known.num_gathered} tokens in one batch: there must be less than 2^31")
    return cu_rows[: num_runs + 1], cu_keys[: num_runs + 1], statistics


def _make(cu_rows: Int32, cu_keys: Int32, statistics: NDArray[np.int64]) -> Runs:
    known = TreeStatistics(*statistics.tolist())
    gather = np.empty(0 if known.num_gathered == known.num_rows else known.num_gathered, np.int32)
    run_of_row = np.empty(known.num_rows, np.int32)
    compiled(_fill)(cu_rows, cu_keys, run_of_row, gather, np.empty(known.longest_path, np.int32))
    return Runs(cu_rows, cu_keys, run_of_row, gather)


def _read_only(array: Int32) -> Int32:
    """Kernels are compiled for each kind of array, and those of a plan are read-only."""
    view = np.ascontiguousarray(array, np.int32).view()
    view.flags.writeable = False
    return view


def _find_leaves(end: Int32, depth: Int32, cu_rows: Int32, cu_keys: Int32, statistics: NDArray[np.int64]) -> int:
    """Write the offsets of the runs and the fields of `TreeStatistics`; returns the number of runs."""
    run, start, total = 0, 0, 0
    for row in range(len(end)):
        if end[row] != row + 1:
            continue
        rows, keys = row + 1 - start, depth[row] + 1
        total += keys
        start = row + 1
        run += 1
        cu_rows[run], cu_keys[run] = start, total
        before = keys - rows
        tiles = (rows + FLASH_ROWS - 1) // FLASH_ROWS
        statistics[3] = max(statistics[3], rows)
        statistics[4] = max(statistics[4], keys)
        statistics[5] += rows * before + rows * (rows + 1) // 2
        # all tiles but the last are full, and see the rows up to their own last one
        statistics[6] += FLASH_ROWS * (tiles * before + FLASH_ROWS * (tiles * (tiles - 1) // 2) + rows)
    statistics[0], statistics[1], statistics[2] = len(end), run, total
    return run


def _fill(cu_rows: Int32, cu_keys: Int32, run_of_row: Int32, gather: Int32, path: Int32) -> None:
    for run in range(len(cu_rows) - 1):
        start, stop = cu_rows[run], cu_rows[run + 1]
        run_of_row[start:stop] = run
        if len(gather) == 0:
            continue
        first, last = cu_keys[run], cu_keys[run + 1]
        # the run's own rows replace the path below the row that it branches from
        shared = last - first - (stop - start)
        for i in range(stop - start):
            path[shared + i] = start + i
        gather[first:last] = path[: last - first]

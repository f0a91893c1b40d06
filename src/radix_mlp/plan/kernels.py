"""The planner's compiled loops. Importing this module imports numba (0.4 s): import it where it is first used.

The prefix tree is path-compressed. A *node* is a run of consecutive rows, numbered in order of first occurrence,
whose tokens are also consecutive in the batch: a run is cut from the tail that one sequence added. So matching a
sequence against a node compares two stretches of memory, a sequence adds at most two nodes (its tail, and the
lower half of the run that it leaves midway), and all work per token is a copy or a count. A child is looked up by
comparing with the first child, then in a hash table keyed by (row before, token, position); splitting a run
changes none of these keys.
"""

from __future__ import annotations

import numba
import numpy as np

from radix_mlp.plan.compiled import compiled

# mypy: allow-untyped-defs, disable-error-code="assignment"

__all__ = ["OK", "WRONG_OFFSETS", "WRONG_VALUES", "depths", "fold_depth_first", "fold_first_occurrence", "parents"]

OK = 0
WRONG_OFFSETS = 1
WRONG_VALUES = 2

# Fields of a node, all int32. In the three links 0 is "none": node 0 is the root, which has no rows.
TOKEN = 0
ROW = 1
LENGTH = 2
PARENT_ROW = 3
FIRST_CHILD = 4
LAST_CHILD = 5
NEXT_SIBLING = 6
DEPTH = 7
NUM_FIELDS = 8

# Tokens processed at once, as vectors. Typed, since an int64 with a uint64 makes a float64.
WIDE = np.uint64(32)
NARROW = np.uint64(8)

NONE = np.uint64(0)
ONE = np.uint64(1)
HALF = np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)


_helper = numba.njit(nogil=True, error_model="numpy")
_inline = numba.njit(nogil=True, error_model="numpy", forceinline=True)


@_helper
def _offsets_are_right(cu_seq_lengths, num_tokens):
    num_falls = 0
    for s in range(1, len(cu_seq_lengths)):
        num_falls += cu_seq_lengths[s] < cu_seq_lengths[s - 1]
    return num_falls == 0 and cu_seq_lengths[0] == 0 and cu_seq_lengths[-1] == num_tokens


@_inline
def _same(ids, positions, with_positions, a, b):
    """Whether tokens `a` and `b` have the same id and position."""
    a, b = np.uint64(a), np.uint64(b)
    return ids[a] == ids[b] and (not with_positions or positions[a] == positions[b])


@_inline
def _differ(x, a, b, width):
    """Not 0 iff `x[a : a + width]` and `x[b : b + width]` differ somewhere."""
    difference = x[a] ^ x[b]
    for j in range(width):
        difference |= x[a + j] ^ x[b + j]
    return difference


@_inline
def _agree(ids, positions, with_positions, a, b, n):
    """Number of leading tokens in which the `n` tokens from `a` and the `n` tokens from `b` agree."""
    # unsigned: a signed index may count from the end, which costs a branch and prevents vectorization
    a, b, n, i = np.uint64(a), np.uint64(b), np.uint64(n), np.uint64(0)
    while i + WIDE <= n and _differ(ids, a + i, b + i, WIDE) == 0:
        if with_positions and _differ(positions, a + i, b + i, WIDE) != 0:
            break
        i += WIDE
    while i + NARROW <= n and _differ(ids, a + i, b + i, NARROW) == 0:
        if with_positions and _differ(positions, a + i, b + i, NARROW) != 0:
            break
        i += NARROW
    while i < n and _same(ids, positions, with_positions, a + i, b + i):
        i += ONE
    return np.int64(i)


@_inline
def _count(out, start, n, value):
    """`out[start : start + n] = value, value + 1, ...`"""
    start, n, value, i = np.uint64(start), np.uint64(n), np.uint64(value), np.uint64(0)
    while i + NARROW <= n:
        for j in range(NARROW):
            out[start + i + j] = value + i + j
        i += NARROW
    while i < n:
        out[start + i] = value + i
        i += ONE


@_inline
def _copy(out, start, n, values, first):
    """`out[start : start + n] = values[first : first + n]`; returns the bitwise or of all values."""
    start, first, bits = np.uint64(start), np.uint64(first), values.dtype.type(0)
    for i in range(np.uint64(n)):
        value = values[first + i]
        out[start + i] = value
        bits |= value
    return bits


@_inline
def _hash(parent_row, token, position):
    h = (np.uint64(token) << np.uint64(32)) ^ np.uint64(position)
    h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    h ^= np.uint64(parent_row + 1) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@_helper
def _grow(ids, positions, with_positions, cu_seq_lengths, unfold, nodes):
    """Grow the tree in `nodes` and write rows by first occurrence to `unfold`; returns how many nodes and rows."""
    num_sequences = len(cu_seq_lengths) - 1
    bits = 3
    while (1 << bits) < 2 * num_sequences:
        bits += 1
    # an entry holds the lower half of a hash and a node; the upper bits give the slot
    table = np.zeros(1 << bits, np.uint64)
    shift = np.uint64(64 - bits)
    mask = np.uint64((1 << bits) - 1)
    zero = positions.dtype.type(0)
    nodes[0] = 0
    nodes[0, PARENT_ROW] = -1
    num_nodes = 1
    num_rows = 0
    for s in range(num_sequences):
        first = np.int64(cu_seq_lengths[s])
        stop = np.int64(cu_seq_lengths[s + 1])
        t = first
        node = NONE
        parent_row = -1
        while t < stop:
            child = np.uint64(nodes[node, FIRST_CHILD])
            slot = NONE
            key = NONE
            if child != NONE and not _same(ids, positions, with_positions, nodes[child, TOKEN], t):
                key = _hash(parent_row, ids[np.uint64(t)], positions[np.uint64(t)] if with_positions else zero)
                slot = key >> shift
                key &= LOW
                child = NONE
                while child == NONE and table[slot] != NONE:
                    if table[slot] >> HALF == key:
                        candidate = table[slot] & LOW
                        if nodes[candidate, PARENT_ROW] == parent_row and _same(
                            ids, positions, with_positions, nodes[candidate, TOKEN], t
                        ):
                            child = candidate
                    slot = (slot + ONE) & mask
            if child != NONE:
                other = np.int64(nodes[child, TOKEN])
                row = np.int64(nodes[child, ROW])
                length = np.int64(nodes[child, LENGTH])
                n = _agree(ids, positions, with_positions, other, t, min(length, stop - t))
                _count(unfold, t, n, row)
                t += n
                node = child
                parent_row = row + n - 1
                if n == length or t == stop:
                    continue
                # the sequence leaves this run midway: the lower half becomes a node and takes the children
                lower = np.uint64(num_nodes)
                num_nodes += 1
                nodes[lower, TOKEN] = other + n
                nodes[lower, ROW] = row + n
                nodes[lower, LENGTH] = length - n
                nodes[lower, PARENT_ROW] = parent_row
                nodes[lower, FIRST_CHILD] = nodes[child, FIRST_CHILD]
                nodes[lower, LAST_CHILD] = nodes[child, LAST_CHILD]
                nodes[lower, NEXT_SIBLING] = 0
                nodes[lower, DEPTH] = nodes[child, DEPTH] + n
                nodes[child, LENGTH] = n
                nodes[child, FIRST_CHILD] = lower
                nodes[child, LAST_CHILD] = lower
                continue
            # what is left of the sequence is new
            new = np.uint64(num_nodes)
            num_nodes += 1
            nodes[new, TOKEN] = t
            nodes[new, ROW] = num_rows
            nodes[new, LENGTH] = stop - t
            nodes[new, PARENT_ROW] = parent_row
            nodes[new, FIRST_CHILD] = 0
            nodes[new, LAST_CHILD] = 0
            nodes[new, NEXT_SIBLING] = 0
            nodes[new, DEPTH] = t - first
            if nodes[node, FIRST_CHILD] == 0:
                nodes[node, FIRST_CHILD] = new
            else:
                # the first child is compared directly, so only the others need the table
                table[slot] = (key << HALF) | new
                nodes[np.uint64(nodes[node, LAST_CHILD]), NEXT_SIBLING] = new
            nodes[node, LAST_CHILD] = new
            _count(unfold, t, stop - t, num_rows)
            num_rows += stop - t
            break
    return num_nodes, num_rows


@compiled
def fold_first_occurrence(ids, positions, cu_seq_lengths, pad_multiple_of, unfold):
    """Rows in order of first occurrence. Returns the status, and ids, positions, fold index as one array `[3, M]`."""
    num_sequences = len(cu_seq_lengths) - 1
    if not _offsets_are_right(cu_seq_lengths, len(ids)):
        return WRONG_OFFSETS, np.empty((3, 0), np.uint32)
    nodes = np.empty((2 * num_sequences + 1, NUM_FIELDS), np.int32)
    num_nodes, num_compact = _grow(ids, positions, True, cu_seq_lengths, unfold, nodes)
    num_rows = -(-num_compact // pad_multiple_of) * pad_multiple_of
    compact = np.empty((3, num_rows), np.uint32)
    compact_ids, compact_positions, fold = compact[0], compact[1], compact[2]
    for k in range(ONE, np.uint64(num_nodes)):
        t = np.int64(nodes[k, TOKEN])
        row = np.int64(nodes[k, ROW])
        n = np.int64(nodes[k, LENGTH])
        _copy(compact_ids, row, n, ids, t)
        _copy(compact_positions, row, n, positions, t)
        _count(fold, row, n, t)
    compact[:, num_compact:] = 0
    return OK, compact


@compiled
def fold_depth_first(ids, positions, with_positions, cu_seq_lengths, pad_multiple_of, unfold):
    """Rows in depth-first preorder.

    Returns the status, the number of rows without padding, ids and positions as one array `[2, M]`, and `end`, fold
    index and depth as another `[3, M]`. Without given positions, a token's position is its index in the sequence,
    and positions are not compared.
    """
    num_tokens = len(ids)
    num_sequences = len(cu_seq_lengths) - 1
    if not _offsets_are_right(cu_seq_lengths, num_tokens):
        return WRONG_OFFSETS, 0, np.empty((2, 0), np.int64), np.empty((3, 0), np.int32)
    nodes = np.empty((2 * num_sequences + 1, NUM_FIELDS), np.int32)
    num_nodes, num_compact = _grow(ids, positions, with_positions, cu_seq_lengths, unfold, nodes)
    num_rows = -(-num_compact // pad_multiple_of) * pad_multiple_of
    values = np.empty((2, num_rows), np.int64)
    indices = np.empty((3, num_rows), np.int32)
    compact_ids, compact_positions = values[0], values[1]
    end, fold, depth = indices[0], indices[1], indices[2]

    bits = np.int64(0)
    new_row = np.empty(num_nodes, np.int32)
    ancestors = np.empty(num_nodes, np.uint64)
    height = 0
    row = 0
    node = np.uint64(nodes[NONE, FIRST_CHILD])
    while node != NONE:
        t = np.int64(nodes[node, TOKEN])
        n = np.int64(nodes[node, LENGTH])
        new_row[node] = row
        bits |= _copy(compact_ids, row, n, ids, t)
        if with_positions:
            bits |= _copy(compact_positions, row, n, positions, t)
        else:
            _count(compact_positions, row, n, nodes[node, DEPTH])
        _count(depth, row, n, nodes[node, DEPTH])
        row += n
        ancestors[height] = node
        height += 1
        node = np.uint64(nodes[node, FIRST_CHILD])
        while node == NONE and height > 0:
            # the subtree of the last ancestor is complete: continue with its sibling
            height -= 1
            done = ancestors[height]
            end[new_row[done] : new_row[done] + nodes[done, LENGTH]] = row
            node = np.uint64(nodes[done, NEXT_SIBLING])
    if bits >> 31 != 0:
        return WRONG_VALUES, 0, values, indices
    values[:, row:] = 0
    depth[row:] = 0
    _count(end, row, num_rows - row, row + 1)

    # a path enters every node at its first row; the fold index is written last, so its memory is free until then
    node_of_row = fold
    for k in range(ONE, np.uint64(num_nodes)):
        node_of_row[nodes[k, ROW]] = k
    for s in range(num_sequences):
        t = np.int64(cu_seq_lengths[s])
        stop = np.int64(cu_seq_lengths[s + 1])
        while t < stop:
            node = np.uint64(node_of_row[unfold[t]])
            n = min(np.int64(nodes[node, LENGTH]), stop - t)
            _count(unfold, t, n, new_row[node])
            t += n
    for k in range(ONE, np.uint64(num_nodes)):
        _count(fold, new_row[k], nodes[k, LENGTH], nodes[k, TOKEN])
    fold[num_compact:] = 0
    return OK, num_compact, values, indices


@compiled
def parents(end, num_compact):
    """Parent row of every row, -1 for roots and padding."""
    result = np.full(len(end), -1, np.int32)
    for row in range(1, num_compact):
        parent = row - 1
        while parent >= 0 and end[parent] <= row:
            parent = np.int64(result[parent])
        result[row] = parent
    return result


@compiled
def depths(parent, num_compact):
    """Number of ancestors of every row, 0 for padding."""
    result = np.zeros(len(parent), np.int32)
    for row in range(num_compact):
        if parent[row] >= 0:
            result[row] = result[parent[row]] + 1
    return result

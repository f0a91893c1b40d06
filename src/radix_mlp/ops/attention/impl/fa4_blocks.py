"""Block lists of the tree's mask in FlashAttention-4's format, made once per batch.

Rows and keys are cut into blocks of `BLOCK`.  Forward, every block of rows gets the blocks of keys that it needs;
backward, every block of keys the blocks of rows that see it: each once in a list of pairs of blocks that need the mask,
and once in a list of those that need none, since every row sees every key.

A list has one line a block, padded to the longest line, so that lines are addressed by a stride.  Backward, the rows
that see all of a block of keys are one interval that starts with the next block: no list, one vector of ascending
numbers serves all lines.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.compiled import compiled

__all__ = [
    "BLOCK",
    "MAX_NUMBERS",
    "BlockSizes",
    "Places",
    "SparseBlocks",
    "forward_sizes",
    "pack_forward_blocks",
    "pack_sparse_blocks",
    "places",
    "sparse_blocks",
]

Int32 = NDArray[np.int32]

BLOCK = 128
"""Rows and keys of a block, as the kernels' tiles want it for a head dimension of 128."""
MAX_NUMBERS = 1 << 23
"""Padded lists that are longer than this (32 MB) are not made."""


class SparseBlocks(NamedTuple):
    """Lists for `T = ceil(M / BLOCK)` blocks."""

    forward_counts: Int32
    """`[2, T]` for every block of rows, how many blocks of keys need a mask, and how many need none."""
    backward_counts: Int32
    """`[2, T]` for every block of keys, how many blocks of rows need a mask, and how many need none."""
    forward_masked: Int32
    """`[T, W]` blocks of keys, ascending; the rest of a line means nothing."""
    forward_full: Int32
    """`[T, W']` likewise."""
    backward_masked: Int32
    """`[T, W'']` blocks of rows, ascending. Those that need no mask are the ones from the line's number + 1 on."""


class BlockSizes(NamedTuple):
    """The sizes of the lists in one vector that do not follow from `M`."""

    forward_masked: int
    """Width of a line, likewise the next two."""
    forward_full: int
    backward_masked: int
    num_masked: int
    """Pairs of blocks that need a mask."""
    num_full: int
    """Pairs of blocks that need none."""


class Places(NamedTuple):
    """Where what `pack_sparse_blocks` packs begins, in this order, and how long it all is."""

    end: int
    """`[T * BLOCK]`, padded with zeros to whole blocks."""
    forward_counts: int
    backward_counts: int
    forward_masked: int
    forward_full: int
    backward_masked: int
    ascending: int
    """The numbers `0 .. 2 T`."""
    stop: int


def places(num_rows: int, sizes: BlockSizes) -> Places:
    """Where the lists of a tree begin."""
    blocks = -(-num_rows // BLOCK)
    forward_counts = blocks * BLOCK
    backward_counts = forward_counts + 2 * blocks
    forward_masked = backward_counts + 2 * blocks
    forward_full = forward_masked + blocks * sizes.forward_masked
    backward_masked = forward_full + blocks * sizes.forward_full
    ascending = backward_masked + blocks * sizes.backward_masked
    stop = ascending + 2 * blocks + 1
    return Places(0, forward_counts, backward_counts, forward_masked, forward_full, backward_masked, ascending, stop)


def sparse_blocks(end: Int32) -> SparseBlocks | None:
    """Lists of a tree, `end` is `[M]` int32; None if they would hold more than `MAX_NUMBERS`.

    Time is proportional to the pairs of blocks listed, memory to the padded lists.

    >>> lists = sparse_blocks(np.full(300, 300, np.int32))
    >>> lists.forward_counts.tolist(), lists.forward_full.tolist()
    ([[1, 1, 1], [0, 1, 2]], [[0, 0], [0, 0], [0, 1]])
    """
    num_blocks = -(-len(end) // BLOCK)
    cuts = np.arange(0, len(end), BLOCK)
    shortest = np.minimum.reduceat(end, cuts) if num_blocks else np.zeros(0, np.int32)
    longest = np.maximum.reduceat(end, cuts) if num_blocks else np.zeros(0, np.int32)
    forward, backward = np.zeros((2, num_blocks), np.int32), np.zeros((2, num_blocks), np.int32)
    none = np.zeros((0, 0), np.int32)
    fill = compiled(_fill)
    fill(shortest, longest, len(end), forward, backward, none, none, none)
    # a line has room for one number at least, which keeps strides above zero
    widths = [max(1, int(counts.max(initial=0))) for counts in (*forward, backward[0])]
    if num_blocks * sum(widths) > MAX_NUMBERS:
        return None
    masked, full, backward_masked = (np.zeros((num_blocks, width), np.int32) for width in widths)
    fill(shortest, longest, len(end), forward, backward, masked, full, backward_masked)
    return SparseBlocks(forward, backward, masked, full, backward_masked)


def pack_sparse_blocks(end: Int32) -> tuple[Int32, BlockSizes]:
    """All in one vector, int32, laid out as `places` says, and the sizes.

    It is empty, with sizes of zero, if the lists would be too long, or there is nothing to list.
    """
    lists = sparse_blocks(end) if len(end) else None
    if lists is None:
        return np.zeros(0, np.int32), BlockSizes(0, 0, 0, 0, 0)
    num_masked, num_full = lists.forward_counts.sum(axis=1).tolist()
    masked, full, backward_masked = (table.shape[1] for table in lists[2:])
    sizes = BlockSizes(masked, full, backward_masked, num_masked, num_full)
    num_blocks = lists.forward_counts.shape[1]
    padded = np.zeros(num_blocks * BLOCK, np.int32)
    padded[: len(end)] = end
    ascending = np.arange(2 * num_blocks + 1, dtype=np.int32)
    return np.concatenate([padded, *(table.ravel() for table in lists), ascending]), sizes


def forward_sizes(num_rows: int) -> BlockSizes:
    """Sizes for which the forward lists of any tree of `num_rows` fit."""
    num_blocks = -(-num_rows // BLOCK)
    return BlockSizes(num_blocks, num_blocks, 1, 0, 0)


def pack_forward_blocks(end: Int32, out: Int32) -> bool:
    """As `pack_sparse_blocks`, into lists of `forward_sizes`, whatever the tree. The backward lists mean nothing.

    False if there are too many numbers.
    """
    num_blocks = -(-len(end) // BLOCK)
    lists = sparse_blocks(end) if 2 * num_blocks * num_blocks <= MAX_NUMBERS else None
    if lists is None:
        return False
    at = places(len(end), forward_sizes(len(end)))
    out[: len(end)] = end
    out[len(end) : at.forward_counts] = 0
    out[at.forward_counts : at.backward_counts] = lists.forward_counts.ravel()
    out[at.backward_counts : at.forward_masked] = lists.backward_counts.ravel()
    for place, table in ((at.forward_masked, lists.forward_masked), (at.forward_full, lists.forward_full)):
        lines = out[place : place + num_blocks * num_blocks].reshape(num_blocks, num_blocks)
        lines[:, : table.shape[1]] = table
    out[at.backward_masked : at.ascending] = 0
    out[at.ascending : at.stop] = np.arange(2 * num_blocks + 1, dtype=np.int32)
    return True


def _fill(
    shortest: Int32,
    longest: Int32,
    num_rows: int,
    forward: Int32,
    backward: Int32,
    masked: Int32,
    full: Int32,
    backward_masked: Int32,
) -> None:
    """Count the entries of all lists and, if the tables have lines, write them.

    `shortest` and `longest` are the smallest and the largest `end` of every block of keys.
    """
    writes = len(masked) > 0
    num_blocks = len(longest)
    forward[:] = 0
    backward[:] = 0
    # blocks of keys that some row from here on sees, ascending
    live = np.empty(num_blocks, np.int32)
    num_live = 0
    for row_block in range(num_blocks):
        first = row_block * BLOCK
        stop = min(first + BLOCK, num_rows)
        live[num_live] = row_block
        num_live += 1
        kept = 0
        for i in range(num_live):
            block = live[i]
            if longest[block] <= first:
                continue
            live[kept] = block
            kept += 1
            if block < row_block and shortest[block] >= stop:
                if writes:
                    full[row_block, forward[1, row_block]] = block
                forward[1, row_block] += 1
                backward[1, block] += 1
            else:
                if writes:
                    masked[row_block, forward[0, row_block]] = block
                    backward_masked[block, backward[0, block]] = row_block
                forward[0, row_block] += 1
                backward[0, block] += 1
        num_live = kept

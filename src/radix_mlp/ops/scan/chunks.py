"""Chunks: the pieces of a tree cut to one size, in steps, for implementations in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.scan.layout import Layout, make_layout
from radix_mlp.plan.compiled import compiled
from radix_mlp.plan.levels import Levels

__all__ = ["Chunks", "Links", "make_chunks"]

Int32 = NDArray[np.int32]


class Links(NamedTuple):
    """How states pass through `n` chunks in breadth-first order.

    A chunk starts from the state after its parent: the chunk before it in its piece, or the last one of the parent
    piece. Chunks with the same number of chunks above them are one step and run together, so a segment boundary
    costs no more than a chunk boundary.
    """

    parent: Tensor
    """`[n]` int32, ascending; 0 in the first step, whose chunks have none."""
    child_offsets: Tensor
    """`[n + 1]` int32: the children of chunk `c` are `child_offsets[c]` up to `child_offsets[c + 1]`."""
    host_steps: Tensor
    """`[D + 1]` int64, on the CPU: the first chunk of each step, then `n`."""


class Chunks(NamedTuple):
    """A layout of `n * size` places, chunk by chunk. The last chunk of a piece may end with empty places."""

    layout: Layout
    links: Links
    size: int


def make_chunks(levels: Levels, size: int, num_rows: int) -> Chunks:
    """The tables of chunks of `size` rows on the CPU, in `O(T)`.

    Example: `a b c d | a b e` has the rows `a b c d e`.
        >>> from radix_mlp.plan import build_plan
        >>> from radix_mlp.plan.levels import make_levels
        >>> plan = build_plan([1, 2, 3, 4, 1, 2, 5], [0, 4, 7])
        >>> layout, links, size = make_chunks(make_levels(plan.segments, plan.num_compact), 2, 5)
        >>> layout.rows.view(-1, size).tolist(), links.parent.tolist(), links.host_steps.tolist()
        ([[0, 1], [2, 3], [4, 0]], [0, 0, 0], [0, 1, 3])
    """
    rows, *links = compiled(_cut)(levels.rows, levels.start, levels.parent, size)
    return Chunks(make_layout(rows, num_rows), Links(*map(torch.from_numpy, links)), size)


def _cut(rows: Int32, start: Int32, parent: Int32, size: int) -> tuple[Int32, Int32, Int32, NDArray[np.int64]]:
    num_pieces = len(parent)
    # children of a piece are consecutive
    first_child = np.zeros(num_pieces, np.int32)
    num_children = np.zeros(num_pieces, np.int32)
    num_chunks = 0
    num_roots = 0
    for piece in range(num_pieces):
        above = parent[piece]
        num_chunks += (start[piece + 1] - start[piece] + size - 1) // size
        if above < 0:
            num_roots += 1
            continue
        if num_children[above] == 0:
            first_child[above] = piece
        num_children[above] += 1

    places = np.full(num_chunks * size, -1, np.int32)
    chunk_parent = np.zeros(num_chunks, np.int32)
    child_offsets = np.full(num_chunks + 1, num_chunks, np.int32)
    steps = np.zeros(num_chunks + 1, np.int64)
    # where in `rows` a chunk starts, and its piece
    source = np.empty(num_chunks, np.int32)
    of_piece = np.empty(num_chunks, np.int32)
    # roots are the first pieces
    for piece in range(num_roots):
        source[piece] = start[piece]
        of_piece[piece] = piece
    num_found = num_roots
    num_steps = 0
    chunk = 0
    while chunk < num_chunks:
        num_steps += 1
        stop = num_found
        steps[num_steps] = stop
        while chunk < stop:
            piece = of_piece[chunk]
            end = min(source[chunk] + size, start[piece + 1])
            for i in range(end - source[chunk]):
                places[chunk * size + i] = rows[source[chunk] + i]
            child_offsets[chunk] = num_found
            if end < start[piece + 1]:
                chunk_parent[num_found] = chunk
                source[num_found] = end
                of_piece[num_found] = piece
                num_found += 1
            else:
                for child in range(first_child[piece], first_child[piece] + num_children[piece]):
                    chunk_parent[num_found] = chunk
                    source[num_found] = start[child]
                    of_piece[num_found] = child
                    num_found += 1
            chunk += 1
    return places, chunk_parent, child_offsets, steps[: num_steps + 1]

"""How the pieces of a tree, level by level, divide into chunks: tables for kernels that work on chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.attention.attention_tree import send_arrays
from radix_mlp.ops.scan.sum_groups import sum_groups
from radix_mlp.plan.levels import Levels

__all__ = [
    "CHUNK",
    "ChunkLevel",
    "ChunkTables",
    "flat_tables",
    "from_parents",
    "make_chunk_tables",
    "tables_of",
    "to_parents",
]

CHUNK = 64
"""Rows of a chunk. Two pieces never share one."""


class ChunkLevel(NamedTuple):
    """`R` pieces whose states pass together. All int64."""

    cu_seqlens: Tensor
    """`[R + 1]` first rows, in the order of levels; the last is one past the level."""
    chunk_offsets: Tensor
    """`[R]` first chunk of each piece."""
    parents: Tensor
    """`[R]` the parent's place in the level above, never decreasing; empty for the roots."""
    child_offsets: Tensor
    """`[R + 1]` where the children of each piece begin in the level below; empty in the last level."""


class ChunkTables(NamedTuple):
    """Tables of one tree on one device, for rows that stand level by level."""

    cu_seqlens: Tensor
    """`[P + 1]` int64, first rows of all pieces."""
    chunk_indices: Tensor
    """`[chunks, 2]` int64, the piece of each chunk, and its place in the piece."""
    levels: tuple[ChunkLevel, ...]


def make_chunk_tables(levels: Levels, device: torch.device) -> ChunkTables:
    """Tables for the pieces of `levels`, in one transfer."""
    chunks = -(-np.diff(levels.start) // CHUNK)
    offsets = np.concatenate([[0], chunks.cumsum()])
    piece = np.repeat(np.arange(len(chunks)), chunks)
    indices = np.stack([piece, np.arange(offsets[-1]) - offsets[piece]], 1)
    spans = list(pairwise(levels.first.tolist()))
    # the parents of a level count from the first piece of the level above
    parents = [levels.parent[low:high] - above for (above, _), (low, high) in pairwise(spans)]
    children = [
        np.searchsorted(below, np.arange(high - low + 1)) for (low, high), below in zip(spans, parents, strict=False)
    ]
    none = np.empty(0, np.int64)
    arrays = [levels.start, indices.ravel()]
    for (low, high), above, below in zip(spans, [none, *parents], [*children, none], strict=True):
        arrays += [levels.start[low : high + 1], offsets[low:high], above, below]
    sent = _send(arrays, device)
    width = len(ChunkLevel._fields)
    of_levels = (ChunkLevel(*sent[i : i + width]) for i in range(2, len(sent), width))
    return ChunkTables(sent[0], sent[1].view(-1, 2), tuple(of_levels))


def _send(arrays: list[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """As int64, each at an address that is a multiple of 16: Triton compiles kernels once more for other addresses."""
    padded = [np.append(x, np.zeros(len(x) % 2, x.dtype)).astype(np.int64) for x in arrays]
    sent, _ = send_arrays(padded, [], device)
    return [tensor[: len(x)] for tensor, x in zip(sent, arrays, strict=True)]


def flat_tables(tables: ChunkTables) -> list[Tensor]:
    """For a custom op. The inverse of `tables_of`."""
    return [tables.cu_seqlens, tables.chunk_indices, *(table for level in tables.levels for table in level)]


def tables_of(flat: list[Tensor]) -> ChunkTables:
    """The inverse of `flat_tables`."""
    cu, indices, *rest = flat
    width = len(ChunkLevel._fields)
    return ChunkTables(cu, indices, tuple(ChunkLevel(*rest[i : i + width]) for i in range(0, len(rest), width)))


def from_parents(final: Tensor | None, level: ChunkLevel) -> Tensor | None:
    """Initial states of a level from the final states of the level above; None for the roots."""
    return None if final is None or level.parents.shape[0] == 0 else final.index_select(0, level.parents)


def to_parents(grad: Tensor | None, level: ChunkLevel) -> Tensor | None:
    """Gradients of final states: sums over the children in the level below, in order; None without children."""
    if grad is None or level.child_offsets.shape[0] == 0:
        return None
    return sum_groups(grad, level.child_offsets)

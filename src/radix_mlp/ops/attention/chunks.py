"""Attention within chunks of a sequence, as Llama 4 has it: attention on the tree cut at every chunk's first depth.

A row sees its left context from `size * (depth // size)` on. Sorted by chunk, and within a chunk as they were, the rows
of all pieces lie in depth-first preorder again, so every implementation runs on them as on any other tree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.attention.attention_tree import AttentionTree, HostTree, send_arrays, send_tables
from radix_mlp.ops.attention.registry import prepare
from radix_mlp.ops.attention.tree_attention import tree_attention
from radix_mlp.ops.row_copies import copy_rows

__all__ = ["Chunks", "attention_in_chunks", "chunks_of", "cut", "name_of"]


class Chunks(NamedTuple):
    """The rows of a tree by chunk."""

    tree: AttentionTree
    """The pieces, as one tree of many roots."""
    order: Tensor
    """`[M]` int64, place among the pieces -> row."""
    place: Tensor
    """`[M]` int64, row -> place among the pieces."""


def chunks_of(tree: HostTree, size: int, impl: str) -> Chunks | None:
    """The pieces of `tree` on its device, with the tables of `impl`; None if no path is longer than one chunk.

    Args:
        tree: of a batch, on the host.
        size: tokens of a chunk.
        impl: the way to run attention.

    Examples:
        >>> end, depth = np.array([4, 3, 3, 4], np.int32), np.array([0, 1, 2, 1], np.int32)
        >>> chunks = chunks_of(HostTree(end, depth, torch.device("cpu")), 2, "dense")
        >>> chunks.order.tolist(), chunks.tree.end.tolist()
        ([0, 1, 3, 2], [3, 2, 3, 4])
    """
    if not len(tree.depth) or tree.depth.max() < size:
        return None
    order, end, depth = cut(tree.end, tree.depth, size)
    # kept for later calls, which may train
    with torch.inference_mode(False):
        tables = prepare(impl, HostTree(end, depth, tree.device, tree.backward))
        sent = dict(zip(tables, send_tables(list(tables.values()), tree.device), strict=True))
        (rows, places), (ends, depths) = send_arrays((order, np.argsort(order)), (end, depth), tree.device)
    return Chunks(AttentionTree(ends, depths, sent), rows, places)


def attention_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, tree: AttentionTree, size: int, *, impl: str, **options: Any
) -> Tensor:
    """`tree_attention` in which row `i` sees key `j` only if `depth[i] // size == depth[j] // size`.

    The pieces come from `tree.prepared` under the name `name_of(size)`, or are made here, with a copy to the host.

    Args:
        q: `[M, Hq, D]`.
        k: `[M, Hkv, D]`.
        v: `[M, Hkv, Dv]`.
        tree: of the batch.
        size: tokens of a chunk.
        impl: the way to run attention.
        options: further ones of `tree_attention`.

    Returns:
        `[M, Hq, Dv]`, differentiable as `tree_attention` is.

    Raises:
        InvalidInputError: the tree computes a part of its rows only (`query_rows`), or has spans.
    """
    if tree.query_rows is not None:
        raise InvalidInputError("attention within chunks computes all rows: pass a plan without query_rows")
    if tree.span_end is not None:
        raise InvalidInputError("attention within chunks is causal: pass a plan without spans")
    if name_of(size) in tree.prepared:
        chunks = tree.prepared[name_of(size)]
    else:
        end, depth = (x.to("cpu", torch.int32).numpy() for x in (tree.end, tree.depth))
        chunks = chunks_of(HostTree(end, depth, tree.end.device), size, impl)
    if chunks is None:
        return tree_attention(q, k, v, tree, impl=impl, **options)
    q, k, v = (copy_rows(x, chunks.order) for x in (q, k, v))
    return copy_rows(tree_attention(q, k, v, chunks.tree, impl=impl, **options), chunks.place)


def name_of(size: int) -> str:
    """The name of the pieces among the tables of a tree."""
    return f"chunks of {size}"


def cut(
    end: NDArray[np.int32], depth: NDArray[np.int32], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Rows by chunk `[M]`, and the `end` and `depth` (`[M]`, int32) of the pieces in that order."""
    chunk = (depth // size).astype(np.int64)
    order = np.argsort(chunk, kind="stable")
    # (chunk, row) as one ascending number: the rows of a subtree that are in its root's chunk are neighbours
    stride = len(depth) + 1
    numbers = chunk[order] * stride + order
    new_end = np.searchsorted(numbers, chunk[order] * stride + end[order])
    return order, new_end.astype(np.int32), (depth % size)[order].astype(np.int32)

"""Copies of rows and their sums, several tensors in one launch: fused kernels on CUDA, plain torch elsewhere.

Copies are found as `radix_mlp.ops.attention.leaf_runs` says: those of row `j` are number `starts[t] + depth[j]`, for
`first[j] <= t < last[j]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from radix_mlp.ops.fold import segment_sum

__all__ = ["Copies", "gather_rows", "sum_copies"]


class Copies(NamedTuple):
    """Where the copies of every row are."""

    first: Tensor
    """`[M]` int32, the first path that holds the row."""
    last: Tensor
    """`[M]` int32, one past the last."""
    starts: Tensor
    """`[R]` int32 or more, number of the first copy of every path."""
    depth: Tensor
    """`[M]` int32, place of the row on all of them."""


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """`x[index]` for up to three tensors `[M, H, D]` of one dtype: `[K, H, D]` each, contiguous.

    `index` is `[K]`, int32 or int64; a negative one gives a row of zeros.
    """
    if _has_kernels(index):
        from radix_mlp.ops.attention.impl.triton_gather import triton_gather

        return triton_gather(tensors, index)
    gathered = [x.index_select(0, index.clamp(min=0)) for x in tensors]
    return [x.masked_fill_((index < 0)[:, None, None], 0) for x in gathered]


def sum_copies(tensors: Sequence[Tensor], copies: Copies) -> list[Tensor]:
    """Sums of copies: up to three tensors `[K, H, D]` of one dtype -> `[M, H, D]` each.

    Half types are summed in float32, every row in the order of its copies; a row without copies gets zeros.
    """
    if _has_kernels(copies.first):
        from radix_mlp.ops.attention.impl.triton_gather import triton_sum

        return triton_sum(tensors, copies)
    num_rows = copies.first.shape[0]
    counts = (copies.last - copies.first).long()
    row = torch.arange(num_rows, device=counts.device).repeat_interleave(counts)
    offsets = counts.cumsum(0) - counts
    path = torch.arange(row.shape[0], device=row.device) - (offsets - copies.first)[row]
    copy = copies.starts.long()[path] + copies.depth[row]
    return [segment_sum(x.index_select(0, copy), row, num_rows) for x in tensors]


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

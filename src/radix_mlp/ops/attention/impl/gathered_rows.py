"""Copies of rows and their sums, several tensors in one launch: fused kernels on CUDA, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from radix_mlp.ops.attention.impl.copies import Copies
from radix_mlp.ops.packages import HAS_TRITON
from radix_mlp.ops.row_copies import segment_sum

__all__ = ["gather_rows", "sum_copies"]


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
    return x.is_cuda and HAS_TRITON

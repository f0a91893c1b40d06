"""Sums of consecutive rows in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_groups", "sum_groups"]


def sum_groups(x: Tensor, offsets: Tensor) -> Tensor:
    """`[m, ...]` -> `[p, ...]`: the sum of the rows of each group, in their order; half types are summed in float32.

    Args:
        offsets: `[p + 1]` the first row of each group, then `m`.

    >>> sum_groups(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3]))
    tensor([3., 0., 4.])
    """
    count = offsets.shape[0] - 1
    wide = x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
    if x.device.type == "cpu":
        group = torch.repeat_interleave(offsets.diff())
        # many times faster than a segment sum, but in no fixed order on CUDA
        return wide.new_zeros(count, *x.shape[1:]).index_add_(0, group, wide).to(x.dtype)
    flat = wide.reshape(x.shape[0], -1)
    sums = torch.segment_reduce(flat, "sum", offsets=offsets.long(), axis=0, initial=0)
    return sums.view(count, *x.shape[1:]).to(x.dtype)


def add_groups(out: Tensor, x: Tensor, group: Tensor, offsets: Tensor) -> None:
    """Add to each row of `out` (`[p, ...]`) the rows of its group, in their order; float32 or float64.

    Args:
        x: `[m, ...]`.
        group: `[m]` the group of each row, ascending.
        offsets: `[p + 1]` the first row of each group, then `m`.

    >>> out = torch.ones(2)
    >>> add_groups(out, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 2, 3]))
    >>> out
    tensor([4., 5.])
    """
    if x.device.type == "cpu":
        out.index_add_(0, group, x)
    else:
        out += sum_groups(x, offsets)

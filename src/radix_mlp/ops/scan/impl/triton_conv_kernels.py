"""Kernels of the convolution on the tree."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_children", "conv_forward", "conv_weight_gradient"]

_ROWS, _CHANNELS = 16, 128
# rows that one program sums for the gradient of weights
_LONG = 256


def conv_forward(x: Tensor, weight: Tensor, windows: Tensor) -> Tensor:
    """`[M, C]`, `[C, K]`, `[M, K]` rows (-1 for none) -> `[M, C]` in x's dtype, summed in float32."""
    rows, channels = x.shape
    out = torch.empty_like(x)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(channels, _CHANNELS))
    _forward[grid](x, weight, windows, out, rows, channels, weight.shape[1], _ROWS, _CHANNELS)
    return out


def conv_weight_gradient(grad: Tensor, x: Tensor, windows: Tensor) -> Tensor:
    """`[C, K]` float32, summed in a fixed order."""
    rows, channels = x.shape
    taps = windows.shape[1]
    parts = torch.empty(triton.cdiv(rows, _LONG), taps, channels, device=x.device)
    grid = (parts.shape[0], triton.cdiv(channels, _CHANNELS))
    _weight[grid](grad, x, windows, parts, rows, channels, taps, _ROWS, _CHANNELS, _LONG)
    return parts.sum(0).T


def add_children(
    x: Tensor, grad: Tensor, weight: Tensor, dtype: torch.dtype, first: Tensor, offsets: Tensor, others: Tensor
) -> Tensor:
    """`weight * grad`, plus for each row the sum of `x` over its children: `[M, C]` in `dtype`.

    Args:
        x: `[M, C]` float32.
        grad: `[M, C]`.
        weight: `[C]`.
        first: `[M]` int32 first child, -1 for none.
        offsets: `[M + 1]` int32: the other children of row `i` are `others[offsets[i] : offsets[i + 1]]`.
    """
    rows, channels = x.shape
    out = torch.empty(rows, channels, dtype=dtype, device=x.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(channels, _CHANNELS))
    _children[grid](x, grad, weight, out, first, offsets, others, rows, channels, _ROWS, _CHANNELS)
    return out


@triton.jit(do_not_specialize=["rows"])
def _forward(x, weight, windows, out, rows, channels, K: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    here, inside = row < rows, col < channels
    total = tl.zeros([R, B], tl.float32)
    for tap in tl.static_range(K):
        source = tl.load(windows + row.to(tl.int64) * K + tap, mask=here, other=-1)
        mask = (source >= 0)[:, None] & inside[None, :]
        value = tl.load(x + source[:, None] * channels + col[None, :], mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + col * K + tap, mask=inside, other=0.0).to(tl.float32)
        total += value * factor[None, :]
    at = row.to(tl.int64)[:, None] * channels + col[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def _weight(
    grad, x, windows, parts, rows, channels, K: tl.constexpr, R: tl.constexpr, B: tl.constexpr, LONG: tl.constexpr
):
    col = tl.program_id(1) * B + tl.arange(0, B)
    inside = col < channels
    for tap in tl.static_range(K):
        total = tl.zeros([B], tl.float32)
        for start in range(0, LONG, R):
            row = tl.program_id(0) * LONG + start + tl.arange(0, R)
            here = row < rows
            source = tl.load(windows + row.to(tl.int64) * K + tap, mask=here, other=-1)
            mask = (source >= 0)[:, None] & inside[None, :]
            value = tl.load(x + source[:, None] * channels + col[None, :], mask=mask, other=0.0).to(tl.float32)
            at = row.to(tl.int64)[:, None] * channels + col[None, :]
            total += tl.sum(value * tl.load(grad + at, mask=mask, other=0.0).to(tl.float32), 0)
        tl.store(parts + (tl.program_id(0) * K + tap) * channels + col, total, mask=inside)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["first", "offsets", "others"])
def _children(x, grad, weight, out, first, offsets, others, rows, channels, R: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    col = tl.program_id(1) * B + tl.arange(0, B)
    here, inside = row < rows, col < channels
    at = row.to(tl.int64)[:, None] * channels + col[None, :]
    mask = here[:, None] & inside[None, :]
    factor = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    child = tl.load(first + row, mask=here, other=-1).to(tl.int64)
    total += tl.load(
        x + child[:, None] * channels + col[None, :], mask=(child >= 0)[:, None] & inside[None, :], other=0.0
    )
    begin = tl.load(offsets + row, mask=here, other=0)
    count = tl.load(offsets + row + 1, mask=here, other=0) - begin
    for number in range(tl.max(count, 0)):
        more = number < count
        child = tl.load(others + begin + number, mask=more, other=0).to(tl.int64)
        total += tl.load(x + child[:, None] * channels + col[None, :], mask=more[:, None] & inside[None, :], other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)

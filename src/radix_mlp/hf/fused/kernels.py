"""What stands between the matrix products, each in one pass over its data: angles, norm, rotation, gate."""

# device code: the compiler types it
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_mlp.ops.cuda_device import capability

__all__ = ["gate", "rms_norm", "rotary_tables", "rotate_heads_"]

_ANGLE_ROWS = 32
_GATE_BLOCK = 1024
_ROTATE_ROWS = 16


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` by row; `x [R, h]` dense, in float32 and rounded once.

    Root mean square layer normalization (Zhang & Sennrich 2019, section 4).
    """
    out = torch.empty_like(x)
    rows, width = x.shape
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(rows,)](x, weight, out, epsilon, width, BLOCK=block, num_warps=_warps(block), **_early(x))
    return out


def rotary_tables(positions: Tensor, inverse_frequencies: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of `positions [R] * inverse_frequencies [D / 2]`, times `scaling`: `[R, D / 2]` float32 each."""
    rows, half = len(positions), len(inverse_frequencies)
    cos, sin = torch.empty(2, rows, half, dtype=torch.float32, device=positions.device)
    if rows:
        _angles_kernel[(triton.cdiv(rows, _ANGLE_ROWS),)](
            positions, inverse_frequencies, cos, sin, rows, scaling,
            HALF=half, BLOCK=triton.next_power_of_2(half), ROWS=_ANGLE_ROWS, num_warps=4,
        )  # fmt: skip
    return cos, sin


def rotate_heads_(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor, float] | None
) -> None:
    """Normalize (if the model does) and rotate the queries and keys of `qkv`, in place.

    Args:
        qkv: `[R, (heads + 2 * kv_heads) * D]` dense: all query heads, all key heads, all value heads.
        cos: `[R, D / 2]` float32, `sin` too.
        heads: query heads.
        kv_heads: key (and value) heads.
        norms: weights `[D]` of the norms of queries and keys, and their epsilon.
    """
    rows, width = len(cos), 2 * cos.shape[1]
    if not rows:
        return
    q_weight, k_weight, epsilon = (cos, cos, 0.0) if norms is None else norms
    grid = (triton.cdiv(rows, _ROTATE_ROWS), heads + kv_heads)
    _rotate_kernel[grid](
        qkv, cos, sin, q_weight, k_weight, epsilon, rows, heads, qkv.stride(0),
        D=width, HALF=triton.next_power_of_2(width // 2), ROWS=_ROTATE_ROWS, NORM=norms is not None,
        num_warps=4, **_early(qkv),
    )  # fmt: skip


def gate(gate_up: Tensor) -> Tensor:
    """`silu(g) * u` of `gate_up [R, 2 I]`, whose left half is `g` and right half `u`: `[R, I]`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        grid = rows, triton.cdiv(width, _GATE_BLOCK)
        _gate_kernel[grid](gate_up, out, width, BLOCK=_GATE_BLOCK, num_warps=4, **_early(gate_up))
    return out


def _early(x: Tensor) -> dict[str, bool]:
    """Launch before the kernel ahead has ended, where the chip can (Hopper and later), and wait inside."""
    can = x.is_cuda and capability(x.device.index) >= (9, 0)
    return {"PDL": can, "launch_pdl": can} if can else {"PDL": False}


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


# both change with every batch
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["positions"])
def _angles_kernel(
    positions, frequencies, cos, sin, rows, scaling, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    # positions are below 2^31, and transformers rounds them to float32 too
    position = tl.load(positions + row, mask=row < rows, other=0).to(tl.float32)
    frequency = tl.load(frequencies + column, mask=column < HALF, other=0.0).to(tl.float32)
    angle = position[:, None] * frequency[None, :]
    place = row.to(tl.int64)[:, None] * HALF + column[None, :]
    tl.store(cos + place, tl.cos(angle) * scaling, mask=inside)
    tl.store(sin + place, tl.sin(angle) * scaling, mask=inside)


@triton.jit
def _rms_norm_kernel(x, weight, out, epsilon, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    tl.store(out + row * width + columns, (value * root * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    qkv, cos, sin, q_weight, k_weight, epsilon, rows, heads, stride,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = (row < rows)[:, None] & (column < D // 2)[None, :]
    place = qkv + row.to(tl.int64)[:, None] * stride + head * D + column[None, :]
    left = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(place + D // 2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.where(head < heads, q_weight, k_weight)
        root = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / D + epsilon)[:, None]
        real = column < D // 2
        left = left * root * tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
        right = right * root * tl.load(weight + D // 2 + column, mask=real, other=0.0).to(tl.float32)[None, :]
    turn = row.to(tl.int64)[:, None] * (D // 2) + column[None, :]
    c = tl.load(cos + turn, mask=inside, other=0.0)
    s = tl.load(sin + turn, mask=inside, other=0.0)
    tl.store(place, (left * c - right * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(place + D // 2, (right * c + left * s).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(gate_up, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)

"""Triton kernels that copy rows by index and sum the copies again, up to three tensors in one launch.

Rows are read through their strides, as Hugging Face hands over `[1, H, M, D]`, and written contiguous, by 16 bytes
where alignment allows.  Addresses are 64 bits wide.
"""

# device code: the compiler types it, and wants the branches of an `if` as they stand
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from radix_mlp.ops.attention.impl.copies import Copies
from radix_mlp.ops.cuda_device import on_device

__all__ = ["GATHER", "SUM", "Launch", "triton_gather", "triton_sum"]


class Launch(NamedTuple):
    """How a kernel is cut up."""

    rows: int
    """Rows of one program, which handles some heads of one tensor."""
    warps: int
    heads: int = 1
    """How many, a power of two."""
    streams: bool = False
    """Whether what is written leaves the cache first, so that rows copied again stay."""


GATHER = Launch(rows=8, warps=4, heads=4, streams=True)
SUM = Launch(rows=8, warps=2)

# numbers and lists differ with every batch: a kernel compiled for one must serve all
_STRIDES = [f"{kind}_stride{i}" for i in range(3) for kind in ("row", "head")]
_LISTS = ["firsts", "lasts", "starts", "depths"]


@triton.jit
def _copy_tile(
    source, target, index, rows, first_head, num_rows, row_stride, head_stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """Some heads of some rows. Strides count vectors, so that the compiler knows how far addresses are aligned."""
    place = tl.arange(0, BLOCK_H * BLOCK_D)
    head = first_head + place // BLOCK_D
    columns = place % BLOCK_D
    wide = ((columns < D) & (head < H))[None, :]
    inside = rows < num_rows
    row = tl.load(index + rows, mask=inside, other=-1).to(tl.int64)
    offsets = (row * row_stride)[:, None] * VECTOR + (head.to(tl.int64) * head_stride * VECTOR + columns)[None, :]
    out = target + (rows * (H * D))[:, None] + (head * D + columns)[None, :]
    known = (row >= 0)[:, None] & wide
    if STREAMS:
        values = tl.load(source + offsets, mask=known, other=0.0, eviction_policy="evict_last")
        tl.store(out, values, mask=inside[:, None] & wide, cache_modifier=".cs")
    else:
        values = tl.load(source + offsets, mask=known, other=0.0)
        tl.store(out, values, mask=inside[:, None] & wide)


@triton.jit(do_not_specialize=["num_rows", *_STRIDES], do_not_specialize_on_alignment=["index"])
def gather_kernel(
    x0, x1, x2, out0, out1, out2, index, num_rows,
    row_stride0, head_stride0, row_stride1, head_stride1, row_stride2, head_stride2,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """A program copies `BLOCK_H` heads of a block of rows: neighbours write neighbouring memory."""
    part0: tl.constexpr = (H0 + BLOCK_H - 1) // BLOCK_H
    part1: tl.constexpr = (H1 + BLOCK_H - 1) // BLOCK_H
    part2: tl.constexpr = (H2 + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    part = program % (part0 + part1 + part2)
    rows = (program // (part0 + part1 + part2)).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if part < part0:
        _copy_tile(
            x0, out0, index, rows, part * BLOCK_H, num_rows, row_stride0, head_stride0,
            H0, D0, BLOCK_H, BLOCK_D, V0, STREAMS,
        )  # fmt: skip
    elif part < part0 + part1:
        _copy_tile(
            x1, out1, index, rows, (part - part0) * BLOCK_H, num_rows, row_stride1, head_stride1,
            H1, D1, BLOCK_H, BLOCK_D, V1, STREAMS,
        )  # fmt: skip
    else:
        _copy_tile(
            x2, out2, index, rows, (part - part0 - part1) * BLOCK_H, num_rows, row_stride2, head_stride2,
            H2, D2, BLOCK_H, BLOCK_D, V2, STREAMS,
        )  # fmt: skip


@triton.jit
def _sum_tile(
    source, target, begin, stop, first, last, starts, depth, rows, head, num_rows,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    wide = (columns < D)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for path in tl.range(begin, stop, loop_unroll_factor=4):
        copy = tl.load(starts + path).to(tl.int64) + depth
        held = (path >= first) & (path < last)
        offsets = copy * (H * D) + head * D
        total += tl.load(source + offsets[:, None] + columns[None, :], mask=held[:, None] & wide, other=0.0)
    out = target + (rows * (H * D) + head * D)[:, None] + columns[None, :]
    tl.store(out, total.to(target.dtype.element_ty), mask=(rows < num_rows)[:, None] & wide)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_LISTS)
def sum_kernel(
    x0, x1, x2, out0, out1, out2, firsts, lasts, starts, depths, num_rows,
    H0: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The paths of neighbouring rows are nested or neighbours, so a program walks from the first to the last."""
    program = tl.program_id(0)
    head = program % (H0 + H1 + H2)
    rows = (program // (H0 + H1 + H2)).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.load(firsts + rows, mask=rows < num_rows, other=0)
    last = tl.load(lasts + rows, mask=rows < num_rows, other=0)
    depth = tl.load(depths + rows, mask=rows < num_rows, other=0)
    begin = tl.min(tl.where(first < last, first, 2147483647), 0)
    stop = tl.max(tl.where(first < last, last, 0), 0)
    if head < H0:
        _sum_tile(
            x0, out0, begin, stop, first, last, starts, depth, rows, head, num_rows, H0, D0, BLOCK_D, BLOCK_R
        )  # fmt: skip
    elif head < H0 + H1:
        _sum_tile(
            x1, out1, begin, stop, first, last, starts, depth, rows, head - H0, num_rows, H1, D1, BLOCK_D, BLOCK_R
        )  # fmt: skip
    else:
        _sum_tile(
            x2, out2, begin, stop, first, last, starts, depth, rows, head - H0 - H1, num_rows, H2, D2, BLOCK_D, BLOCK_R
        )  # fmt: skip


def triton_gather(tensors: Sequence[Tensor], index: Tensor, launch: Launch = GATHER) -> list[Tensor]:
    """See `gathered_rows.gather_rows`: `[M, H, D]`, any strides -> `[K, H, D]` contiguous."""
    tensors = [x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in tensors]
    out = [x.new_empty(index.shape[0], *x.shape[1:]) for x in tensors]
    vectors = [_vector(x) for x in tensors]
    strides = [x.stride(i) // vector for x, vector in zip(tensors, vectors, strict=True) for i in (0, 1)]
    heads, widths = _shapes(tensors)
    num_rows = index.shape[0]
    if num_rows and sum(heads):
        with on_device(index.device):
            parts = sum(triton.cdiv(number, launch.heads) for number in heads)
            gather_kernel[(triton.cdiv(num_rows, launch.rows) * parts,)](
                *_three(tensors), *_three(out), index.contiguous(), num_rows, *_three(strides, 2),
                *heads, *widths, *_three(vectors), BLOCK_H=launch.heads, BLOCK_D=_padded(max(widths)),
                BLOCK_R=launch.rows, STREAMS=launch.streams, num_warps=launch.warps,
            )  # fmt: skip
    return out


def triton_sum(tensors: Sequence[Tensor], copies: Copies, launch: Launch = SUM) -> list[Tensor]:
    """See `gathered_rows.sum_copies`: `[K, H, D]` -> `[M, H, D]`. The same bits on every call."""
    tensors = [x.contiguous() for x in tensors]
    num_rows = copies.first.shape[0]
    out = [x.new_empty(num_rows, *x.shape[1:]) for x in tensors]
    heads, widths = _shapes(tensors)
    if num_rows and sum(heads):
        with on_device(copies.first.device):
            sum_kernel[(triton.cdiv(num_rows, launch.rows) * sum(heads),)](
                *_three(tensors), *_three(out), *copies, num_rows, *heads, *widths,
                BLOCK_D=_padded(max(widths)), BLOCK_R=launch.rows, num_warps=launch.warps,
            )  # fmt: skip
    return out


def _vector(x: Tensor) -> int:
    """Elements that can be read at once from anywhere in `x`: 16 bytes if strides, width and address allow."""
    vector = 16 // x.element_size()
    while vector > 1 and (
        any(number % vector for number in (x.stride(0), x.stride(1), x.shape[2]))
        or x.data_ptr() % (vector * x.element_size())
    ):
        vector //= 2
    return vector


def _shapes(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Heads and widths of three tensors; those that are missing have no heads."""
    missing = 3 - len(tensors)
    return [x.shape[1] for x in tensors] + [0] * missing, [x.shape[2] for x in tensors] + [1] * missing


def _three(values: Sequence[Any], size: int = 1) -> list[Any]:
    """Three groups of `size` values: those that are missing repeat the first."""
    return [*values, *list(values[:size]) * (3 - len(values) // size)]


def _padded(width: int) -> int:
    return 1 << (width - 1).bit_length()

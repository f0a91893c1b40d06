"""Triton kernels for the arithmetic on tiles of logits: one pass instead of the dozen of `head_tiles`.

Forward: one program per row reads its part of the tile twice, for the maximum and then, from cache, for the sums
relative to it.  Backward: one program for some columns of a row.
"""

# device code: the compiler types it
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_mlp.ops.cuda_device import on_device
from radix_mlp.ops.head.head_tiles import HeadEdges, RowGradients, RowSums, Tile, TileOptions

__all__ = ["add_tile", "gradient_of_tile"]

FORWARD_BLOCK = 2048
BACKWARD_BLOCK = 1024
EDGE_BLOCK = 32


@triton.jit
def _finish(
    z, bias, offsets, inside, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr
):
    """Bias, scale, soft cap and temperature."""
    if HAS_BIAS:
        z += tl.load(bias + offsets, mask=inside, other=0.0)
    z *= scale
    if CAPPED:
        # tanh(x) = 2 sigmoid(2 x) - 1
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z * inverse_temperature


@triton.jit(do_not_specialize=["first", "low", "num_columns"])
def forward_kernel(
    logits, bias, targets, cuts, maximum, sum_exp, sum_exp_logit, sum_exp_squared, sum_logit, greedy_ids, target_logit,
    first, low, num_columns, row_stride, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, SQUARED: tl.constexpr, MEAN: tl.constexpr,
    BLOCK: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Program `r` adds row `r` of the tile to the running sums of row `first + r`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    row += first
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        offsets = start + columns
        inside = offsets < num_columns
        z = tl.load(logits + offsets, mask=inside, other=0.0)
        z = _finish(z, bias, offsets, inside, scale, softcap, inverse_temperature, HAS_BIAS, CAPPED)
        if MEAN:
            total += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, -float("inf"))
        # of equal values the first stays
        better = z > best
        best = tl.where(better, z, best)
        place = tl.where(better, offsets, place)
    largest = tl.max(best, 0)
    before = tl.load(maximum + row)
    if largest > before:
        tl.store(greedy_ids + row, low + tl.min(tl.where(best == largest, place, num_columns), 0))
    new = tl.maximum(before, largest)
    tl.store(maximum + row, new)
    # where every logit so far is -inf: -inf - 0 keeps exp at 0, -inf - -inf would be NaN
    base = tl.where(new == -float("inf"), 0.0, new)
    if MEAN:
        tl.store(sum_logit + row, tl.load(sum_logit + row) + tl.sum(total, 0))

    exp_sum = tl.zeros([BLOCK], tl.float32)
    exp_logit = tl.zeros([BLOCK], tl.float32)
    exp_squared = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        offsets = start + columns
        inside = offsets < num_columns
        z = tl.load(logits + offsets, mask=inside, other=0.0)
        z = _finish(z, bias, offsets, inside, scale, softcap, inverse_temperature, HAS_BIAS, CAPPED)
        weight = tl.where(inside, tl.exp(z - base), 0.0)
        exp_sum += weight
        if ENTROPY:
            exp_logit += weight * z
        if SQUARED:
            exp_squared += weight * weight
    shrink = tl.exp(before - base)
    tl.store(sum_exp + row, tl.load(sum_exp + row) * shrink + tl.sum(exp_sum, 0))
    if ENTROPY:
        tl.store(sum_exp_logit + row, tl.load(sum_exp_logit + row) * shrink + tl.sum(exp_logit, 0))
    if SQUARED:
        tl.store(sum_exp_squared + row, tl.load(sum_exp_squared + row) * shrink * shrink + tl.sum(exp_squared, 0))

    end = tl.load(cuts + row + 1)
    for start in range(tl.load(cuts + row), end, EDGES):
        edges = start + tl.arange(0, EDGES)
        offsets = tl.load(targets + edges, mask=edges < end, other=-1) - low
        inside = (offsets >= 0) & (offsets < num_columns) & (edges < end)
        z = tl.load(logits + offsets, mask=inside, other=0.0)
        z = _finish(z, bias, offsets, inside, scale, softcap, inverse_temperature, HAS_BIAS, CAPPED)
        tl.store(target_logit + edges, z, mask=inside)


@triton.jit(do_not_specialize=["first", "low", "num_columns"])
def backward_kernel(
    logits, out, bias, targets, cuts, of_edges, of_rows, of_entropy, log_sum_exp, entropy,
    first, low, num_columns, row_stride, out_stride, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program `(r, b)` writes the gradient of the products of row `r` in column block `b`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_stride
    row += first
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_columns
    z = tl.load(logits + offsets, mask=inside, other=0.0)
    z = _finish(z, bias, offsets, inside, scale, softcap, inverse_temperature, HAS_BIAS, CAPPED)
    log_p = z - tl.load(log_sum_exp + row)
    factor = tl.zeros([BLOCK], tl.float32) + tl.load(of_rows + row)
    if ENTROPY:
        factor += tl.load(of_entropy + row) * (log_p + tl.load(entropy + row))
    grad = -tl.exp(log_p) * factor
    for edge in range(tl.load(cuts + row), tl.load(cuts + row + 1)):
        grad += tl.where(offsets == tl.load(targets + edge) - low, tl.load(of_edges + edge), 0.0)
    if CAPPED:
        # the derivative of the cap, from the capped value
        capped = z / (inverse_temperature * softcap)
        grad *= 1 - capped * capped
    grad *= scale * inverse_temperature
    tl.store(out + offsets, grad.to(out.dtype.element_ty), mask=inside)


def add_tile(sums: RowSums, tile: Tile, logits: Tensor, bias: Tensor | None) -> None:
    """Like `RowSums.add`, for float32."""
    options, edges = sums.options, sums.edges
    with on_device(logits.device):
        forward_kernel[(tile.last - tile.first,)](
            logits, logits if bias is None else bias, edges.targets, edges.cuts,
            sums.maximum, sums.sum_exp, sums.sum_exp_logit, sums.sum_exp_squared, sums.sum_logit, sums.greedy_ids,
            sums.target_logit, tile.first, tile.low, tile.high - tile.low, logits.stride(0), *_numbers(options),
            HAS_BIAS=bias is not None, CAPPED=options.softcap is not None, ENTROPY=options.entropy,
            SQUARED=options.log_sum_sq_probs, MEAN=options.mean_logit, BLOCK=FORWARD_BLOCK, EDGES=EDGE_BLOCK,
            num_warps=8,
        )  # fmt: skip


def gradient_of_tile(
    by_row: RowGradients, tile: Tile, logits: Tensor, bias: Tensor | None, edges: HeadEdges, options: TileOptions
) -> Tensor:
    """Like `RowGradients.of_products`, for float32 logits."""
    out = logits if options.compute_dtype == logits.dtype else torch.empty_like(logits, dtype=options.compute_dtype)
    nothing = by_row.of_rows
    with on_device(logits.device):
        backward_kernel[(tile.last - tile.first, triton.cdiv(tile.high - tile.low, BACKWARD_BLOCK))](
            logits, out, logits if bias is None else bias, edges.targets, edges.cuts, by_row.of_edges, by_row.of_rows,
            nothing if by_row.of_entropy is None else by_row.of_entropy, by_row.log_sum_exp,
            nothing if by_row.of_entropy is None else by_row.entropy,
            tile.first, tile.low, tile.high - tile.low, logits.stride(0), out.stride(0), *_numbers(options),
            HAS_BIAS=bias is not None, CAPPED=options.softcap is not None, ENTROPY=by_row.of_entropy is not None,
            BLOCK=BACKWARD_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _numbers(options: TileOptions) -> tuple[float, float, float]:
    return float(options.scale), float(options.softcap or 1.0), 1.0 / options.temperature

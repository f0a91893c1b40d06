"""Linear attention with decay inside chunks, in Triton: outputs, gradients of values, sums of decays."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["chunk_outputs", "chunk_sums", "value_gradients"]


def chunk_sums(
    x: Tensor, scale: float, cu_seqlens: Tensor, chunk_indices: Tensor, chunk_size: int, *, reverse: bool = False
) -> Tensor:
    """`scale` times sums of `x` (`[M, H]`) from the chunk's first row to each row; with `reverse`, from each row to the
    chunk's last. float32."""
    rows, heads = x.shape
    out = torch.empty(rows, heads, device=x.device)
    block = min(triton.next_power_of_2(heads), 32)
    _sums[(len(chunk_indices), triton.cdiv(heads, block))](
        x, out, cu_seqlens, chunk_indices, scale, heads, chunk_size, block, reverse
    )
    return out


def chunk_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    states: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    chunk_indices: Tensor,
    chunk_size: int,
) -> Tensor:
    """`scale * (2^g q S + tril(2^(g_i - g_j) q k') v)` in every chunk; shapes as in `chunk_gradients`."""
    groups, key_dim = q.shape[1:]
    _, heads, value_dim = v.shape
    out = torch.empty_like(v)
    # narrower blocks are miscompiled on Hopper by Triton 3.6, without an error (docs/log.md, 2026-12-01)
    block_k = block_v = 64
    _outputs[(triton.cdiv(value_dim, block_v) * len(chunk_indices), heads)](
        q, k, v, g, states, out, cu_seqlens, chunk_indices, scale,
        groups, heads, key_dim, value_dim, chunk_size, block_k, block_v,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def value_gradients(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    grad_out: Tensor,
    grad_states: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    chunk_indices: Tensor,
    chunk_size: int,
) -> Tensor:
    """Gradient of the values, `[M, Hv, V]`: what a row's value adds to outputs below it and to the chunk's state."""
    groups, key_dim = q.shape[1:]
    _, heads, value_dim = grad_out.shape
    out = torch.empty_like(grad_out)
    # narrower blocks are miscompiled on Hopper by Triton 3.6, without an error (docs/log.md, 2026-12-01)
    block_k = block_v = 64
    _values[(triton.cdiv(value_dim, block_v) * len(chunk_indices), heads)](
        q, k, g, grad_out, grad_states, out, cu_seqlens, chunk_indices, scale,
        groups, heads, key_dim, value_dim, chunk_size, block_k, block_v,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _rows(cu_seqlens, chunk_indices, chunk, C: tl.constexpr):
    """First row of a chunk, and one past its last."""
    segment = tl.load(chunk_indices + chunk * 2).to(tl.int64)
    start = tl.load(cu_seqlens + segment).to(tl.int64) + tl.load(chunk_indices + chunk * 2 + 1).to(tl.int64) * C
    return start, tl.minimum(start + C, tl.load(cu_seqlens + segment + 1).to(tl.int64))


@triton.jit(do_not_specialize=["scale"])
def _sums(
    x, out, cu_seqlens, chunk_indices, scale,
    H: tl.constexpr, C: tl.constexpr, B: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    start, stop = _rows(cu_seqlens, chunk_indices, tl.program_id(0), C)
    row = start + tl.arange(0, C)
    head = tl.program_id(1) * B + tl.arange(0, B)
    at = row[:, None] * H + head[None, :]
    mask = (row < stop)[:, None] & (head < H)[None, :]
    tl.store(out + at, tl.cumsum(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), 0, REVERSE) * scale, mask=mask)


@triton.jit(do_not_specialize=["scale"])
def _outputs(
    q, k, v, g, states, out, cu_seqlens, chunk_indices, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(V, BV)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head = tl.program_id(1)
    group = head // (H // G)
    start, stop = _rows(cu_seqlens, chunk_indices, chunk, C)
    row = start + tl.arange(0, C)
    here = row < stop
    col_v = tile * BV + tl.arange(0, BV)
    in_v = col_v < V
    scores = tl.zeros([C, C], tl.float32)
    result = tl.zeros([C, BV], tl.float32)
    for step in range(0, K, BK):
        col_k = step + tl.arange(0, BK)
        in_k = col_k < K
        at_k = row[:, None] * G * K + group * K + col_k[None, :]
        mask_k = here[:, None] & in_k[None, :]
        queries = tl.load(q + at_k, mask=mask_k, other=0.0)
        keys = tl.load(k + at_k, mask=mask_k, other=0.0)
        at_state = (chunk.to(tl.int64) * H + head) * K * V + col_k[:, None] * V + col_v[None, :]
        state = tl.load(states + at_state, mask=in_k[:, None] & in_v[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), scores)
        result = tl.dot(queries, state.to(queries.dtype), result)
    decay = tl.load(g + row * H + head, mask=here, other=0.0)
    lower = (row[:, None] >= row[None, :]) & here[:, None] & here[None, :]
    between = tl.where(lower, decay[:, None] - decay[None, :], 0.0)
    scores = tl.where(lower, scores * tl.exp2(between), 0.0)
    at_v = (row[:, None] * H + head) * V + col_v[None, :]
    mask_v = here[:, None] & in_v[None, :]
    values = tl.load(v + at_v, mask=mask_v, other=0.0)
    result = tl.dot(scores.to(values.dtype), values, result * tl.exp2(decay)[:, None]) * scale
    tl.store(out + at_v, result.to(out.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["scale"])
def _values(
    q, k, g, grad_out, grad_states, out, cu_seqlens, chunk_indices, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(V, BV)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head = tl.program_id(1)
    group = head // (H // G)
    start, stop = _rows(cu_seqlens, chunk_indices, chunk, C)
    row = start + tl.arange(0, C)
    here = row < stop
    col_v = tile * BV + tl.arange(0, BV)
    in_v = col_v < V
    # scores transposed, as a product: [key, query]
    scores = tl.zeros([C, C], tl.float32)
    result = tl.zeros([C, BV], tl.float32)
    for step in range(0, K, BK):
        col_k = step + tl.arange(0, BK)
        in_k = col_k < K
        at_k = row[:, None] * G * K + group * K + col_k[None, :]
        mask_k = here[:, None] & in_k[None, :]
        queries = tl.load(q + at_k, mask=mask_k, other=0.0)
        keys = tl.load(k + at_k, mask=mask_k, other=0.0)
        at_state = (chunk.to(tl.int64) * H + head) * K * V + col_k[:, None] * V + col_v[None, :]
        d_state = tl.load(grad_states + at_state, mask=in_k[:, None] & in_v[None, :], other=0.0)
        scores = tl.dot(keys, tl.trans(queries), scores)
        result = tl.dot(keys, d_state.to(keys.dtype), result)
    decay = tl.load(g + row * H + head, mask=here, other=0.0)
    last = tl.load(g + (stop - 1) * H + head)
    upper = (row[:, None] <= row[None, :]) & here[:, None] & here[None, :]
    between = tl.where(upper, decay[None, :] - decay[:, None], 0.0)
    scores = tl.where(upper, scores * tl.exp2(between), 0.0) * scale
    at_v = (row[:, None] * H + head) * V + col_v[None, :]
    mask_v = here[:, None] & in_v[None, :]
    do = tl.load(grad_out + at_v, mask=mask_v, other=0.0)
    result = tl.dot(scores.to(do.dtype), do, result * tl.where(here, tl.exp2(last - decay), 0.0)[:, None])
    tl.store(out + at_v, result.to(out.dtype.element_ty), mask=mask_v)

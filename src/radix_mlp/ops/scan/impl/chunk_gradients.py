"""Gradients inside the chunks of a gated recurrence, in Triton.

flash-linear-attention has this kernel too, but Triton 3.4.0 to 3.7.0 compile it wrongly for Hopper (its issue 640): a
transposed result of a product becomes the operand of another product. Here the transposed product is computed instead.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["chunk_gradients"]


def chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    states: Tensor,
    grad_out: Tensor,
    grad_states: Tensor,
    grad_values: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    chunk_indices: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of queries, keys, the delta rule's `w` and decays, given the gradients of states and values.

    For a chunk with state `S` before it and decay sums `g` (base 2, from the chunk's start), the output is
    `scale * (2^g q S + tril(2^(g_i - g_j) q k') v)` and the state after it `2^g_last S + (2^(g_last - g) k)' v`,
    where the delta rule's `v = u - w S`.

    Args:
        q, k: `[M, G, K]`, rows level by level; `Hv` is a multiple of `G`.
        v, grad_out: `[M, Hv, V]`.
        g: `[M, Hv]` float32, sums of log2 decays from the chunk's first row.
        states: `[chunks, Hv, K, V]`, before every chunk.
        grad_states: `[chunks, Hv, K, V]`, of the state after every chunk.
        grad_values: `[M, Hv, V]`, for the delta rule.
        cu_seqlens: `[segments + 1]`.
        chunk_indices: `[chunks, 2]`, segment and place in it.

    Returns:
        Gradients of `q` and `k` (`[M, G, K]`), of `w` (`[M, Hv, K]`) or None, and of `g` (`[M, Hv]` float32).
    """
    rows, groups, key_dim = q.shape
    heads, value_dim = v.shape[1:]
    # narrower blocks are miscompiled on Hopper by Triton 3.6, without an error (docs/log.md, 2026-12-01)
    block_k, block_v = 64 if key_dim <= 64 else 128, 64
    tiles = triton.cdiv(key_dim, block_k)
    grad_q, grad_k = q.new_empty(rows, heads, key_dim), k.new_empty(rows, heads, key_dim)
    grad_w = None if grad_values is None else k.new_empty(rows, heads, key_dim)
    grad_g = g.new_empty(tiles, rows, heads)
    _kernel[(tiles * len(chunk_indices), heads)](
        q, k, v, g, states, grad_out, grad_states, grad_values, grad_q, grad_k, grad_w, grad_g,
        cu_seqlens, chunk_indices, rows, scale,
        groups, heads, key_dim, value_dim, chunk_size, block_k, block_v, tiles, grad_w is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if groups != heads:
        grad_q, grad_k = (x.view(rows, groups, heads // groups, key_dim).sum(2) for x in (grad_q, grad_k))
    return grad_q, grad_k, grad_w, grad_g.sum(0)


@triton.jit(do_not_specialize=["num_rows", "scale"])
def _kernel(
    q, k, v, g, states, grad_out, grad_states, grad_values, grad_q, grad_k, grad_w, grad_g,
    cu_seqlens, chunk_indices, num_rows, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    chunk, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head = tl.program_id(1)
    group = head // (H // G)
    segment = tl.load(chunk_indices + chunk * 2).to(tl.int64)
    start = tl.load(cu_seqlens + segment).to(tl.int64) + tl.load(chunk_indices + chunk * 2 + 1).to(tl.int64) * C
    stop = tl.minimum(start + C, tl.load(cu_seqlens + segment + 1).to(tl.int64))
    row = start + tl.arange(0, C)
    here = row < stop
    col_k = tile * BK + tl.arange(0, BK)
    in_k = col_k < K
    state = (chunk.to(tl.int64) * H + head) * K * V

    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    dw = tl.zeros([C, BK], tl.float32)
    # scores' gradients, and the same transposed
    ds = tl.zeros([C, C], tl.float32)
    ds_t = tl.zeros([C, C], tl.float32)
    along_state = tl.zeros([BK], tl.float32)
    for step in range(0, V, BV):
        col_v = step + tl.arange(0, BV)
        in_v = col_v < V
        at_v = (row[:, None] * H + head) * V + col_v[None, :]
        mask_v = here[:, None] & in_v[None, :]
        values = tl.load(v + at_v, mask=mask_v, other=0.0)
        do = tl.load(grad_out + at_v, mask=mask_v, other=0.0)
        at_state = state + col_k[None, :] * V + col_v[:, None]
        mask_state = in_v[:, None] & in_k[None, :]
        s = tl.load(states + at_state, mask=mask_state, other=0.0)
        d_s = tl.load(grad_states + at_state, mask=mask_state, other=0.0)
        along_state += tl.sum(s.to(tl.float32) * d_s.to(tl.float32), 0)
        ds = tl.dot(do, tl.trans(values), ds)
        ds_t = tl.dot(values, tl.trans(do), ds_t)
        dq = tl.dot(do, s.to(do.dtype), dq)
        dk = tl.dot(values, d_s.to(values.dtype), dk)
        if DELTA:
            dv = tl.load(grad_values + at_v, mask=mask_v, other=0.0)
            dw = tl.dot(dv.to(values.dtype), s.to(values.dtype), dw)
    at_w = (row[:, None] * H + head) * K + col_k[None, :]
    mask_k = here[:, None] & in_k[None, :]
    if DELTA:
        tl.store(grad_w + at_w, (-dw).to(grad_w.dtype.element_ty), mask=mask_k)

    at_k = (row[:, None] * G + group) * K + col_k[None, :]
    queries = tl.load(q + at_k, mask=mask_k, other=0.0)
    keys = tl.load(k + at_k, mask=mask_k, other=0.0)
    decay = tl.load(g + row * H + head, mask=here, other=0.0)
    last = tl.load(g + (stop - 1) * H + head)
    to_last = tl.where(here, tl.exp2(last - decay), 0.0)
    dq = dq * tl.exp2(decay)[:, None] * scale
    dk = dk * to_last[:, None]
    d_last = tl.sum(along_state, 0) * tl.exp2(last) + tl.sum(tl.sum(dk * keys, 1), 0)
    between = decay[:, None] - decay[None, :]
    lower = (row[:, None] >= row[None, :]) & here[:, None] & here[None, :]
    ds = tl.where(lower, ds * tl.exp2(tl.where(lower, between, 0.0)), 0.0) * scale
    upper = (row[:, None] <= row[None, :]) & here[:, None] & here[None, :]
    ds_t = tl.where(upper, ds_t * tl.exp2(tl.where(upper, -between, 0.0)), 0.0) * scale
    dq = tl.dot(ds.to(keys.dtype), keys, dq)
    dk = tl.dot(ds_t.to(queries.dtype), queries, dk)
    dg = tl.sum(dq * queries, 1) - tl.sum(dk * keys, 1)
    dg += tl.where(row == stop - 1, d_last, 0.0)
    tl.store(grad_q + at_w, dq.to(grad_q.dtype.element_ty), mask=mask_k)
    tl.store(grad_k + at_w, dk.to(grad_k.dtype.element_ty), mask=mask_k)
    at_g = tile.to(tl.int64) * num_rows * H + row * H + head
    tl.store(grad_g + at_g, dg, mask=here)

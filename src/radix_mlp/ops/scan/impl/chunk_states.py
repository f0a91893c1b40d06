"""The pass of a decaying state over the chunks of one level, forward and backward, in Triton.

flash-linear-attention's kernel wants keys repeated to all heads; here many heads share the keys of a group.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["pass_gradients", "pass_states"]


def pass_states(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    states: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor,
    chunk_offsets: Tensor,
    chunk_size: int,
) -> Tensor:
    """Write the state before every chunk of the given segments into `states`; returns their final states.

    Args:
        k: `[M, G, K]`.
        v: `[M, Hv, V]`, `Hv` a multiple of `G`.
        g: `[M, Hv]` float32, log2 decays summed from the chunk's first row.
        states: `[chunks, Hv, K, V]`, of all levels.
        initial: `[segments, Hv, K, V]` float32; None for zeros.
        cu_seqlens: `[segments + 1]` first rows of these segments. chunk_offsets: `[segments]` their first chunks.

    Returns:
        `[segments, Hv, K, V]` float32.
    """
    _, groups, key_dim = k.shape
    heads, value_dim = v.shape[1:]
    segments = len(cu_seqlens) - 1
    final = torch.empty(segments, heads, key_dim, value_dim, device=k.device)
    # narrower blocks are miscompiled on Hopper by Triton 3.6, without an error (docs/log.md, 2026-12-01)
    block_k = block_v = 64
    grid = (triton.cdiv(key_dim, block_k) * triton.cdiv(value_dim, block_v), segments * heads)
    _forward[grid](
        k, v, g, states, initial, final, cu_seqlens, chunk_offsets,
        groups, heads, key_dim, value_dim, chunk_size, block_k, block_v, initial is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return final


def pass_gradients(
    q: Tensor,
    g: Tensor,
    grad_out: Tensor,
    grad_states: Tensor,
    grad_final: Tensor | None,
    scale: float,
    cu_seqlens: Tensor,
    chunk_offsets: Tensor,
    chunk_size: int,
) -> Tensor:
    """Write the gradient of the state after every chunk into `grad_states`; returns that of the initial states.

    Shapes as in `pass_states`; `grad_final` is `[segments, Hv, K, V]` float32, None for zeros.
    """
    _, groups, key_dim = q.shape
    heads, value_dim = grad_out.shape[1:]
    segments = len(cu_seqlens) - 1
    grad_initial = torch.empty(segments, heads, key_dim, value_dim, device=q.device)
    # narrower blocks are miscompiled on Hopper by Triton 3.6, without an error (docs/log.md, 2026-12-01)
    block_k = block_v = 64
    grid = (triton.cdiv(key_dim, block_k) * triton.cdiv(value_dim, block_v), segments * heads)
    _backward[grid](
        q, g, grad_out, grad_states, grad_final, grad_initial, cu_seqlens, chunk_offsets, scale,
        groups, heads, key_dim, value_dim, chunk_size, block_k, block_v, grad_final is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return grad_initial


@triton.jit
def _forward(
    k, v, g, states, initial, final, cu_seqlens, chunk_offsets,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    tiles_v = tl.cdiv(V, BV)
    tile_k, tile_v = tl.program_id(0) // tiles_v, tl.program_id(0) % tiles_v
    segment, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = head // (H // G)
    begin, end = tl.load(cu_seqlens + segment).to(tl.int64), tl.load(cu_seqlens + segment + 1).to(tl.int64)
    chunk = tl.load(chunk_offsets + segment).to(tl.int64)
    col_k, col_v = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    at = col_k[:, None] * V + col_v[None, :]
    inside = (col_k[:, None] < K) & (col_v[None, :] < V)
    own = tl.program_id(1).to(tl.int64) * K * V
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + own + at, mask=inside, other=0.0)
    for start in range(begin, end, C):
        tl.store(states + (chunk * H + head) * K * V + at, state.to(states.dtype.element_ty), mask=inside)
        stop = tl.minimum(start + C, end)
        row = start + tl.arange(0, C)
        here = row < stop
        at_k = (row[None, :] * G + group) * K + col_k[:, None]
        keys = tl.load(k + at_k, mask=(col_k[:, None] < K) & here[None, :], other=0.0)
        at_v = (row[:, None] * H + head) * V + col_v[None, :]
        values = tl.load(v + at_v, mask=here[:, None] & (col_v[None, :] < V), other=0.0)
        decay = tl.load(g + row * H + head, mask=here, other=0.0)
        last = tl.load(g + (stop - 1) * H + head)
        scaled = values * tl.where(here, tl.exp2(last - decay), 0.0)[:, None]
        state = tl.dot(keys, scaled.to(keys.dtype), state * tl.exp2(last))
        chunk += 1
    tl.store(final + own + at, state, mask=inside)


@triton.jit(do_not_specialize=["scale"])
def _backward(
    q, g, grad_out, grad_states, grad_final, grad_initial, cu_seqlens, chunk_offsets, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    tiles_v = tl.cdiv(V, BV)
    tile_k, tile_v = tl.program_id(0) // tiles_v, tl.program_id(0) % tiles_v
    segment, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = head // (H // G)
    begin, end = tl.load(cu_seqlens + segment).to(tl.int64), tl.load(cu_seqlens + segment + 1).to(tl.int64)
    chunks = tl.cdiv(end - begin, C)
    first = tl.load(chunk_offsets + segment).to(tl.int64)
    col_k, col_v = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    at = col_k[:, None] * V + col_v[None, :]
    inside = (col_k[:, None] < K) & (col_v[None, :] < V)
    own = tl.program_id(1).to(tl.int64) * K * V
    grad = tl.zeros([BK, BV], tl.float32)
    if HAS_FINAL:
        grad = tl.load(grad_final + own + at, mask=inside, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step
        at_state = ((first + chunk) * H + head) * K * V
        tl.store(grad_states + at_state + at, grad.to(grad_states.dtype.element_ty), mask=inside)
        start = begin + chunk * C
        stop = tl.minimum(start + C, end)
        row = start + tl.arange(0, C)
        here = row < stop
        at_q = (row[None, :] * G + group) * K + col_k[:, None]
        queries = tl.load(q + at_q, mask=(col_k[:, None] < K) & here[None, :], other=0.0)
        at_v = (row[:, None] * H + head) * V + col_v[None, :]
        do = tl.load(grad_out + at_v, mask=here[:, None] & (col_v[None, :] < V), other=0.0)
        decay = tl.load(g + row * H + head, mask=here, other=0.0)
        last = tl.load(g + (stop - 1) * H + head)
        scaled = do * (tl.exp2(decay) * scale)[:, None]
        grad = tl.dot(queries, scaled.to(queries.dtype), grad * tl.exp2(last))
    tl.store(grad_initial + own + at, grad, mask=inside)

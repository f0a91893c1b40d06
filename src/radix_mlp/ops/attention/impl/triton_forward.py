"""The forward kernel: FlashAttention's online softmax over the ranges of a tile's root path."""

# device code: the compiler types it, wants both branches of an `if`, and takes no `and` of run-time conditions
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from radix_mlp.ops.attention.impl.triton_walk import (
    key_bounds,
    last_keys,
    load_keys,
    masked_piece,
    query_rows,
    range_bounds,
    scores,
    tile_start,
    visible,
)

__all__ = ["forward_kernel"]


@triton.jit(
    do_not_specialize=["num_rows", "num_ranges", "window"],
    do_not_specialize_on_alignment=["end", "depth", "span_end", "tables"],
)
def forward_kernel(
    q, k, v, k_edge, v_edge, sinks, out, lse,
    end, depth, span_end, tables,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    num_rows, num_ranges, num_kv_heads, scale_log2, cap_log2, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ORDER_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SPANS: tl.constexpr, HAS_SINKS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, STAGES_E: tl.constexpr,
):  # fmt: skip
    """One program: a tile of `T` tokens x `G` heads of one kv head, `BLOCK_M >= T * G` packed rows.

    Blocks of `BLOCK_N` keys that every row sees need no mask; the rest goes in blocks of `BLOCK_E` keys.
    """
    ranges = tables + num_rows
    order = ranges + 4 * num_ranges
    rank = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    t0 = tile_start(order, rank, num_rows, T, ORDER_ROWS)
    if t0 >= num_rows:
        return
    t1 = tl.minimum(t0 + T, num_rows)
    token, head, real = query_rows(t0, t1, kv_head, G, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    query = tl.load(
        q + token.to(tl.int64)[:, None] * stride_qt + head.to(tl.int64)[:, None] * stride_qh + columns[None, :],
        mask=(columns < D)[None, :],
        other=0.0,
    )
    token_depth = token
    lowest, highest = 0, 0
    if HAS_WINDOW:
        token_depth = tl.load(depth + token)
        lowest = tl.min(token_depth, 0)
        highest = tl.max(token_depth, 0)
    if not TMA:
        k += kv_head.to(tl.int64) * stride_kh
        v += kv_head.to(tl.int64) * stride_vh
    # a descriptor has one block size; a pointer serves both
    if k_edge is None:
        k_edge, v_edge = k, v

    # finite, so that a row without a visible key in its first blocks makes no NaN
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    line = tl.load(tables + t0)
    last_key = last_keys(token, span_end, HAS_SPANS)
    full_limit, stop = t0, t1
    if HAS_SPANS:
        stop = tl.max(last_key, 0) + 1
    while line >= 0:
        first, full, full_stop = range_bounds(
            ranges, line, full_limit, t1, depth, lowest, highest, window, HAS_WINDOW, BLOCK_N
        )
        line = tl.load(ranges + line * 4 + 3)
        for start in tl.range(full, full_stop, BLOCK_N, num_stages=STAGES):
            key = load_keys(k, kv_head, start, num_rows, stride_kt, TMA, False, D, BLOCK_D, BLOCK_N)
            raw = tl.dot(query, key.T, input_precision=PRECISION)
            if HAS_CAP:
                score, _ = scores(raw, scale_log2, cap_log2, HAS_CAP)
                new_top = tl.maximum(top, tl.max(score, 1))
                weight = tl.math.exp2(score - new_top[:, None])
            else:
                new_top = tl.maximum(top, tl.max(raw, 1) * scale_log2)
                weight = tl.math.exp2(raw * scale_log2 - new_top[:, None])
            shrink = tl.math.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None]
            value = load_keys(v, kv_head, start, num_rows, stride_vt, TMA, False, DV, BLOCK_DV, BLOCK_N)
            acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
            top = new_top
        pieces = tl.cdiv(stop - full_stop, BLOCK_E)
        if HAS_WINDOW:
            pieces += tl.cdiv(full - first, BLOCK_E)
        for i in tl.range(0, pieces, num_stages=STAGES_E):
            start, limit = masked_piece(i, first, full, full_stop, stop, HAS_WINDOW, BLOCK_E)
            key_row = start + tl.arange(0, BLOCK_E)
            key = load_keys(k_edge, kv_head, start, num_rows, stride_kt, TMA, True, D, BLOCK_D, BLOCK_E)
            raw = tl.dot(query, key.T, input_precision=PRECISION)
            score, _ = scores(raw, scale_log2, cap_log2, HAS_CAP)
            # not before the product: that spills with tiles of 128 rows and 4 warps
            key_end, key_depth = key_bounds(key_row, end, depth, limit, HAS_WINDOW)
            seen = visible(
                token[:, None],
                last_key[:, None],
                token_depth[:, None],
                key_row[None, :],
                key_end[None, :],
                key_depth[None, :],
                window,
                HAS_WINDOW,
            )
            score = tl.where(seen, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.math.exp2(score - new_top[:, None])
            shrink = tl.math.exp2(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None]
            value = load_keys(v_edge, kv_head, start, num_rows, stride_vt, TMA, True, DV, BLOCK_DV, BLOCK_E)
            acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
            top = new_top
        full_limit = tl.load(ranges + tl.maximum(line, 0) * 4 + 1)
        stop = full_limit
        if HAS_WINDOW:
            if tl.load(depth + full_limit - 1) + window <= lowest:
                line = -1

    result = acc / total[:, None]
    wide = token.to(tl.int64) * (num_kv_heads * G) + head
    value_columns = tl.arange(0, BLOCK_DV)
    mask = real[:, None] & (value_columns < DV)[None, :]
    tl.store(out + wide[:, None] * DV + value_columns[None, :], result.to(out.dtype.element_ty), mask=mask)
    log_sum = (top + tl.math.log2(total)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * num_rows + token, log_sum, mask=real)

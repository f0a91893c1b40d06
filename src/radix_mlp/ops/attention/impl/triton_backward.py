"""The backward kernels, without atomics: dQ over the forward's ranges; dK and dV over chunks of queries, then a sum."""

# device code: the compiler types it, wants both branches of an `if`, and takes no `and` of run-time conditions
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505, SIM102

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

__all__ = ["dkdv_kernel", "dq_kernel", "sum_kernel"]


@triton.jit(
    do_not_specialize=["num_rows", "num_ranges", "window"],
    do_not_specialize_on_alignment=["end", "depth", "span_end", "tables"],
)
def dq_kernel(
    q, k, v, k_edge, v_edge, out, dout, lse, delta, dq,
    end, depth, span_end, tables,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    num_rows, num_ranges, num_kv_heads, scale, scale_log2, cap_log2, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ORDER_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SPANS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, STAGES_E: tl.constexpr,
):  # fmt: skip
    """dQ of one tile, as the forward kernel walks it; also writes `delta = rowsum(dout * out)` for `dkdv_kernel`.

    `stride_o*` are those of dout; out and dq are contiguous.
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
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    wide = token.to(tl.int64) * (num_kv_heads * G) + head
    value_mask = (value_columns < DV)[None, :]
    query = tl.load(
        q + token.to(tl.int64)[:, None] * stride_qt + head.to(tl.int64)[:, None] * stride_qh + columns[None, :],
        mask=(columns < D)[None, :],
        other=0.0,
    )
    grad = tl.load(
        dout
        + token.to(tl.int64)[:, None] * stride_ot
        + head.to(tl.int64)[:, None] * stride_oh
        + value_columns[None, :],
        mask=value_mask,
        other=0.0,
    )
    result = tl.load(out + wide[:, None] * DV + value_columns[None, :], mask=value_mask, other=0.0)
    row_delta = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * num_rows + token, row_delta, mask=real)
    row_lse = tl.load(lse + head.to(tl.int64) * num_rows + token) * 1.4426950408889634

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
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

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
            value = load_keys(v, kv_head, start, num_rows, stride_vt, TMA, False, DV, BLOCK_DV, BLOCK_N)
            raw = tl.dot(query, key.T, input_precision=PRECISION)
            pull = tl.dot(grad, value.T, input_precision=PRECISION)
            score, slope = scores(raw, scale_log2, cap_log2, HAS_CAP)
            weight = tl.math.exp2(score - row_lse[:, None])
            push = weight * (pull - row_delta[:, None])
            if HAS_CAP:
                push = push * slope
            acc = tl.dot(push.to(key.dtype), key, acc, input_precision=PRECISION)
        pieces = tl.cdiv(stop - full_stop, BLOCK_E)
        if HAS_WINDOW:
            pieces += tl.cdiv(full - first, BLOCK_E)
        for i in tl.range(0, pieces, num_stages=STAGES_E):
            start, limit = masked_piece(i, first, full, full_stop, stop, HAS_WINDOW, BLOCK_E)
            key_row = start + tl.arange(0, BLOCK_E)
            # loaded before the product, which hides their latency
            key_end, key_depth = key_bounds(key_row, end, depth, limit, HAS_WINDOW)
            key = load_keys(k_edge, kv_head, start, num_rows, stride_kt, TMA, True, D, BLOCK_D, BLOCK_E)
            value = load_keys(v_edge, kv_head, start, num_rows, stride_vt, TMA, True, DV, BLOCK_DV, BLOCK_E)
            raw = tl.dot(query, key.T, input_precision=PRECISION)
            pull = tl.dot(grad, value.T, input_precision=PRECISION)
            score, slope = scores(raw, scale_log2, cap_log2, HAS_CAP)
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
            weight = tl.where(seen, tl.math.exp2(score - row_lse[:, None]), 0.0)
            push = weight * (pull - row_delta[:, None])
            if HAS_CAP:
                push = push * slope
            acc = tl.dot(push.to(key.dtype), key, acc, input_precision=PRECISION)
        full_limit = tl.load(ranges + tl.maximum(line, 0) * 4 + 1)
        stop = full_limit
        if HAS_WINDOW:
            if tl.load(depth + full_limit - 1) + window <= lowest:
                line = -1

    tl.store(
        dq + wide[:, None] * D + columns[None, :],
        (acc * scale).to(dq.dtype.element_ty),
        mask=real[:, None] & (columns < D)[None, :],
    )


@triton.jit
def _load_queries(
    source, t, kv_head, limit, stride_t, stride_h,
    TMA: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_M, BLOCK_D]` packed rows of queries (or of dout) from token `t` on, zeros from `limit` on."""
    if TMA:
        return source.load([t, kv_head * G, 0]).reshape([BLOCK_M, BLOCK_D])
    else:
        packed = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_D)
        row = packed // G
        pointers = (
            source
            + tl.cast(t, tl.int64) * stride_t
            + (row * stride_t)[:, None]
            # heads may be as far apart as `M` rows
            + (kv_head * G + packed % G).to(tl.int64)[:, None] * stride_h
            + columns[None, :]
        )
        mask = ((row < T) & (t + row < limit))[:, None]
        if D != BLOCK_D:
            mask = mask & (columns < D)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["num_rows", "items_at", "blocks_at", "window"],
    do_not_specialize_on_alignment=["end", "depth", "span_end", "span_start", "tables"],
)
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, partial_dk, partial_dv,
    end, depth, span_end, span_start, tables,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    num_rows, items_at, blocks_at, num_kv_heads, scale, scale_log2, cap_log2, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SPANS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, STAGES_E: tl.constexpr,
):  # fmt: skip
    """dK and dV of `BLOCK_N` keys of one kv head over one chunk of the queries that see them, all heads of the group.

    The only chunk of a block writes the gradients; one of several writes a float32 partial sum to its slot.
    """
    items, blocks = tables + items_at, tables + blocks_at
    subs: tl.constexpr = KEY_BLOCK // BLOCK_N
    item = tl.program_id(0) // (num_kv_heads * subs)
    kv_head = tl.program_id(0) // subs % num_kv_heads
    block = tl.load(items + item * 4)
    chunk_first = tl.load(items + item * 4 + 1)
    chunk_stop = tl.load(items + item * 4 + 2)
    slot = tl.load(items + item * 4 + 3)
    sub = tl.program_id(0) % subs * BLOCK_N
    s0 = block * KEY_BLOCK + sub
    # every query of [s0 + BLOCK_N - 1, shortest) sees all keys, none from `longest` on sees any
    shortest = tl.load(blocks + block * 2)
    longest = tl.load(blocks + block * 2 + 1)
    first = tl.maximum(chunk_first, s0)
    if HAS_SPANS:
        # earlier rows that see these keys are in a span with the first of them; the first chunk takes them
        earliest = tl.load(span_start + s0, mask=s0 < num_rows, other=num_rows)
        first = tl.where(chunk_first == block * KEY_BLOCK, earliest, first)
    stop = tl.maximum(tl.minimum(chunk_stop, longest), first)
    full = tl.minimum(tl.maximum(first, s0 + BLOCK_N - 1), stop)
    whole = tl.maximum(tl.minimum(stop, shortest) - full, 0) // T * T
    whole = tl.where(s0 + BLOCK_N > num_rows, 0, whole)
    if HAS_WINDOW:
        whole = whole * 0
    full = tl.where(whole > 0, full, first)
    full_stop = full + whole

    key_row = s0 + tl.arange(0, BLOCK_N)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    key_mask = (key_row < num_rows)[:, None]
    key_end = tl.load(end + key_row, mask=key_row < num_rows, other=0)
    key = tl.load(
        k + key_row.to(tl.int64)[:, None] * stride_kt + kv_head.to(tl.int64) * stride_kh + columns[None, :],
        mask=key_mask & (columns < D)[None, :],
        other=0.0,
    )
    value = tl.load(
        v + key_row.to(tl.int64)[:, None] * stride_vt + kv_head.to(tl.int64) * stride_vh + value_columns[None, :],
        mask=key_mask & (value_columns < DV)[None, :],
        other=0.0,
    )
    key_depth = key_row
    if HAS_WINDOW:
        key_depth = tl.load(depth + key_row, mask=key_row < num_rows, other=0)
    packed = tl.arange(0, BLOCK_M)
    row = packed // G
    per_head = (kv_head * G + packed % G).to(tl.int64) * num_rows + row
    key_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for t in tl.range(full, full_stop, T, num_stages=STAGES):
        query = _load_queries(q, t, kv_head, num_rows, stride_qt, stride_qh, TMA, G, T, D, BLOCK_D, BLOCK_M)
        grad = _load_queries(dout, t, kv_head, num_rows, stride_ot, stride_oh, TMA, G, T, DV, BLOCK_DV, BLOCK_M)
        row_lse = tl.load(lse + per_head + t, mask=row < T, other=0.0) * 1.4426950408889634
        row_delta = tl.load(delta + per_head + t, mask=row < T, other=0.0)
        raw = tl.dot(key, query.T, input_precision=PRECISION)
        score, slope = scores(raw, scale_log2, cap_log2, HAS_CAP)
        weight = tl.math.exp2(score - row_lse[None, :])
        value_acc = tl.dot(weight.to(grad.dtype), grad, value_acc, input_precision=PRECISION)
        pull = tl.dot(value, grad.T, input_precision=PRECISION)
        push = weight * (pull - row_delta[None, :])
        if HAS_CAP:
            push = push * slope
        key_acc = tl.dot(push.to(query.dtype), query, key_acc, input_precision=PRECISION)

    left = tl.cdiv(full - first, T)
    pieces = left + tl.cdiv(stop - full_stop, T)
    for i in tl.range(0, pieces, num_stages=STAGES_E):
        t = tl.where(i < left, first + i * T, full_stop + (i - left) * T)
        limit = tl.where(i < left, full, stop)
        query = _load_queries(q, t, kv_head, num_rows, stride_qt, stride_qh, TMA, G, T, D, BLOCK_D, BLOCK_M)
        grad = _load_queries(dout, t, kv_head, num_rows, stride_ot, stride_oh, TMA, G, T, DV, BLOCK_DV, BLOCK_M)
        real = (row < T) & (t + row < limit)
        row_lse = tl.load(lse + per_head + t, mask=real, other=0.0) * 1.4426950408889634
        row_delta = tl.load(delta + per_head + t, mask=real, other=0.0)
        raw = tl.dot(key, query.T, input_precision=PRECISION)
        score, slope = scores(raw, scale_log2, cap_log2, HAS_CAP)
        token = t + row
        token_depth, last_key = token, token
        if HAS_SPANS:
            last_key = tl.load(span_end + token, mask=real, other=0) - 1
        if HAS_WINDOW:
            token_depth = tl.load(depth + token, mask=real, other=0)
        seen = real[None, :] & visible(
            token[None, :],
            last_key[None, :],
            token_depth[None, :],
            key_row[:, None],
            key_end[:, None],
            key_depth[:, None],
            window,
            HAS_WINDOW,
        )
        weight = tl.where(seen, tl.math.exp2(score - row_lse[None, :]), 0.0)
        value_acc = tl.dot(weight.to(grad.dtype), grad, value_acc, input_precision=PRECISION)
        pull = tl.dot(value, grad.T, input_precision=PRECISION)
        push = weight * (pull - row_delta[None, :])
        if HAS_CAP:
            push = push * slope
        key_acc = tl.dot(push.to(query.dtype), query, key_acc, input_precision=PRECISION)

    key_acc = key_acc * scale
    if slot < 0:
        wide = key_row.to(tl.int64) * num_kv_heads + kv_head
        tl.store(
            dk + wide[:, None] * D + columns[None, :],
            key_acc.to(dk.dtype.element_ty),
            mask=key_mask & (columns < D)[None, :],
        )
        tl.store(
            dv + wide[:, None] * DV + value_columns[None, :],
            value_acc.to(dv.dtype.element_ty),
            mask=key_mask & (value_columns < DV)[None, :],
        )
    else:
        wide = (slot.to(tl.int64) * num_kv_heads + kv_head) * KEY_BLOCK + sub + tl.arange(0, BLOCK_N)
        tl.store(partial_dk + wide[:, None] * D + columns[None, :], key_acc, mask=(columns < D)[None, :])
        tl.store(
            partial_dv + wide[:, None] * DV + value_columns[None, :], value_acc, mask=(value_columns < DV)[None, :]
        )


@triton.jit
def _sum_slots(
    partial, grad, block, first, stop, row, kv_head, num_rows, num_kv_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for slot in range(first, stop):
        wide = (tl.cast(slot, tl.int64) * num_kv_heads + kv_head) * KEY_BLOCK + row
        acc += tl.load(partial + wide[:, None] * D + columns[None, :], mask=(columns < D)[None, :], other=0.0)
    key_row = block * KEY_BLOCK + row
    tl.store(
        grad + (key_row.to(tl.int64) * num_kv_heads + kv_head)[:, None] * D + columns[None, :],
        acc.to(grad.dtype.element_ty),
        mask=(key_row < num_rows)[:, None] & (columns < D)[None, :],
    )


@triton.jit(do_not_specialize=["splits_at", "num_splits", "num_rows"], do_not_specialize_on_alignment=["tables"])
def sum_kernel(
    partial_dk, partial_dv, dk, dv, tables, splits_at, num_splits, num_rows, num_kv_heads,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partial gradients of one split key block, in the order of their slots: dK first, then dV."""
    subs: tl.constexpr = KEY_BLOCK // BLOCK_N
    program = tl.program_id(0) // (num_kv_heads * subs)
    split = tables + splits_at + program % num_splits * 3
    kv_head = tl.program_id(0) // subs % num_kv_heads
    row = tl.program_id(0) % subs * BLOCK_N + tl.arange(0, BLOCK_N)
    block, first, stop = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    if program < num_splits:
        _sum_slots(
            partial_dk, dk, block, first, stop, row, kv_head, num_rows, num_kv_heads, D, BLOCK_D, BLOCK_N, KEY_BLOCK
        )  # fmt: skip
    else:
        _sum_slots(
            partial_dv, dv, block, first, stop, row, kv_head, num_rows, num_kv_heads, DV, BLOCK_DV, BLOCK_N, KEY_BLOCK
        )  # fmt: skip

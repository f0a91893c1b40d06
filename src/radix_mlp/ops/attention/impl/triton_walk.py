"""Device functions that the forward and the backward kernels share: tiles, the walk up a root path, scores."""

# device code: the compiler types it, wants both branches of an `if`, and takes no `and` of run-time conditions
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505, SIM102

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "key_bounds",
    "last_keys",
    "load_keys",
    "masked_piece",
    "query_rows",
    "range_bounds",
    "scores",
    "tile_start",
    "visible",
]


@triton.jit
def tile_start(order, rank, num_rows, T: tl.constexpr, ORDER_ROWS: tl.constexpr):
    """First row of the tile that runs as number `rank`: heaviest groups first where tiles divide `ORDER_ROWS`."""
    if ORDER_ROWS % T == 0:
        per_group: tl.constexpr = ORDER_ROWS // T
        return tl.load(order + rank // per_group) * ORDER_ROWS + (rank % per_group) * T
    else:
        return (tl.cdiv(num_rows, T) - 1 - rank) * T


@triton.jit
def query_rows(t0, t1, kv_head, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Token row and head of every packed row of a tile. Rows past the tile repeat its last token."""
    packed = tl.arange(0, BLOCK_M)
    token = t0 + packed // G
    return tl.minimum(token, t1 - 1), kv_head * G + packed % G, token < t1


@triton.jit
def range_bounds(
    ranges, line, full_stop, t1, depth, lowest, highest, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One range of the walk: first key needed, first key that all rows see, one past the last such (whole blocks).

    `lowest` and `highest` are the depths of the tile's rows; they matter under a window only.
    """
    first = tl.load(ranges + line * 4)
    subtree_end = tl.load(ranges + line * 4 + 2)
    full = first
    if HAS_WINDOW:
        if subtree_end > 0:
            # depth grows by one per row along a range without gaps
            offset = tl.load(depth + first) - 1 + window
            full = tl.minimum(tl.maximum(first, first + highest - offset), full_stop)
            first = tl.minimum(tl.maximum(first, first + lowest - offset), full_stop)
    whole = tl.where(subtree_end >= t1, (full_stop - full) // BLOCK_N * BLOCK_N, 0)
    full = tl.where(whole > 0, full, first)
    return first, full, full + whole


@triton.jit
def masked_piece(i, first, full, full_stop, stop, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Block `i` of the keys of a range left and right of its full part: start and limit."""
    if HAS_WINDOW:
        left = tl.cdiv(full - first, BLOCK)
        start = tl.where(i < left, first + i * BLOCK, full_stop + (i - left) * BLOCK)
        return start, tl.where(i < left, full, stop)
    else:
        return full_stop + i * BLOCK, stop


@triton.jit
def load_keys(
    source, head, start, limit, stride,
    TMA: tl.constexpr, CHECK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, BLOCK_D]` rows of keys or values: `source` is a descriptor, or a pointer to the head's first row."""
    if TMA:
        return source.load([head, start, 0]).reshape([BLOCK_N, BLOCK_D])
    else:
        rows = tl.arange(0, BLOCK_N)
        columns = tl.arange(0, BLOCK_D)
        pointers = source + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
        if CHECK and D != BLOCK_D:
            return tl.load(pointers, mask=(start + rows < limit)[:, None] & (columns < D)[None, :], other=0.0)
        elif CHECK:
            return tl.load(pointers, mask=(start + rows < limit)[:, None], other=0.0)
        elif D != BLOCK_D:
            return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def key_bounds(key, end, depth, limit, HAS_WINDOW: tl.constexpr):
    """`end` and, under a window, `depth` of the keys; no row sees those from `limit` on."""
    key_end = tl.load(end + key, mask=key < limit, other=0)
    key_depth = key_end
    if HAS_WINDOW:
        key_depth = tl.load(depth + key, mask=key < limit, other=0)
    return key_end, key_depth


@triton.jit
def visible(token, last_key, token_depth, key, key_end, key_depth, window, HAS_WINDOW: tl.constexpr):
    """The mask of the design, for arguments shaped to broadcast. See `last_keys`."""
    seen = (key <= last_key) & (token < key_end)
    if HAS_WINDOW:
        seen = seen & (token_depth - key_depth < window)
    return seen


@triton.jit
def last_keys(token, span_end, HAS_SPANS: tl.constexpr):
    """The last key that each token may see: itself, or the last one of its span."""
    if HAS_SPANS:
        return tl.load(span_end + token) - 1
    else:
        return token


@triton.jit
def scores(raw, scale_log2, cap_log2, HAS_CAP: tl.constexpr):
    """Raw products in units of log 2 after scale and soft cap, and the slope of the cap.

    tanh(x) = 1 - 2 / (1 + 2^(2 x log2 e)); `scale_log2` then holds `2 log2(e) scale / cap`.
    """
    if HAS_CAP:
        bent = 1.0 - 2.0 / (1.0 + tl.math.exp2(raw * scale_log2))
        return bent * cap_log2, 1.0 - bent * bent
    else:
        return raw * scale_log2, 1.0

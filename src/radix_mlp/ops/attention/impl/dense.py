"""Tree attention in plain torch: one tile of queries at a time against the ranges of keys it can see.

Any device and dtype.  Work is rows x visible keys, memory one tile's: never `[M, M]`, never `[N, ...]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind
from radix_mlp.ops.attention.attention_tree import AttentionTree, HostTree, host_query_rows, tables_of
from radix_mlp.ops.attention.impl.dense_tiles import Tile, pack_tiles, unpack_tiles
from radix_mlp.ops.attention.impl.padded_attention import attend, attend_backward, pack_heads, unpack_heads

__all__ = ["SAVES_LSE", "Tables", "backward", "forward", "prepare", "why_not"]

SAVES_LSE = False
# rows of a packed tile (tokens times query heads a kv head): measured on a 2-core CPU, float32, D 64, the flash
# kernel runs at 90 GFLOP/s with 128 rows, 100 with 256, 120 with 512, 130 with 768 and no more with 1024; but a tile
# of T rows also computes T / 2 keys a row for nothing, so tiles grow with the keys before them
MIN_PACKED_ROWS = 256
MAX_PACKED_ROWS = 768
# a path that starts at a root is plain causal attention, which skips half of the work: left whole from this length
MIN_CAUSAL_ROWS = 64


class Tables(NamedTuple):
    """Query tiles and the ranges of keys that they see."""

    host_tiles: Tensor
    """int32, as `dense_tiles.pack_tiles` packs them."""


def why_not(kind: CallKind) -> None:
    """None: it runs every call."""


def prepare(tree: HostTree) -> Tables:
    """See `attention_call.Implementation`."""
    return Tables(torch.from_numpy(pack_tiles(tree.end, tree.depth)))


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `attention_call.Implementation`. Of `query_rows`, tiles keep those that lie in them."""
    q, k, v, sinks, tree, scale, window, softcap = call
    heads, kv_heads, width = q.shape[1], k.shape[1], v.shape[2]
    sinks = None if sinks is None else sinks.view(kv_heads, -1)
    out = q.new_empty(q.shape[0], heads, width)
    # the CPU's flash kernel needs equal head dimensions of keys and values
    padded = F.pad(v, (0, q.shape[2] - width)) if width < q.shape[2] else v
    rows = torch.arange(len(tree.end), device=q.device, dtype=torch.int32)
    query_rows = host_query_rows(tree)
    plain = softcap is None and sinks is None and query_rows is None and tree.span_end is None
    span_end = _host_span_end(tree)
    for tile in _tiles(tree, heads // kv_heads, causal_below=(window or len(rows)) if plain else 0):
        part, local = _queries(tile, query_rows)
        if part.start == part.stop:
            continue
        if plain and _is_causal(tile, window):
            out[part] = _causal(q[part], k[part], padded[part], scale)[..., :width]
            continue
        ranges, mask = _visible(tile, tree, rows, span_end, window, heads // kv_heads, _mask_dtype(q))
        if local is not None:
            mask = mask.unflatten(0, (-1, heads // kv_heads))[local.to(mask.device)].flatten(0, 1)
        packed = attend(
            pack_heads(q[part], kv_heads),
            _gather(k, ranges),
            _gather(padded, ranges),
            mask,
            sinks,
            scale=scale,
            softcap=softcap,
        )
        out[part] = unpack_heads(packed, heads)[..., :width]
    return out, q.new_empty(0, dtype=torch.float32)


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `attention_call.Implementation`. Tiles add to the gradients of k and v one after another."""
    q, k, v, sinks, tree, scale, window, softcap = call
    heads, kv_heads = q.shape[1], k.shape[1]
    wide = _mask_dtype(q)
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    by_kv_head = None if sinks is None else sinks.view(kv_heads, -1)
    grad_sinks = q.new_zeros((kv_heads, heads // kv_heads), dtype=wide)
    rows = torch.arange(len(tree.end), device=q.device, dtype=torch.int32)
    span_end = _host_span_end(tree)
    for tile in _tiles(tree, heads // kv_heads):
        ranges, mask = _visible(tile, tree, rows, span_end, window, heads // kv_heads, wide)
        tile_q, tile_k, tile_v, tile_sinks = attend_backward(
            pack_heads(grad_out[tile.start : tile.stop], kv_heads),
            pack_heads(q[tile.start : tile.stop], kv_heads),
            _gather(k, ranges),
            _gather(v, ranges),
            mask,
            by_kv_head,
            scale=scale,
            softcap=softcap,
        )
        grad_q[tile.start : tile.stop] = unpack_heads(tile_q, heads)
        _scatter_add(grad_k, tile_k, ranges)
        _scatter_add(grad_v, tile_v, ranges)
        if tile_sinks is not None:
            grad_sinks += tile_sinks
    flat_sinks = None if sinks is None else grad_sinks.view(-1).to(sinks.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), flat_sinks


def _queries(tile: Tile, query_rows: np.ndarray | None) -> tuple[slice, Tensor | None]:
    """Where the queries of a tile lie in q, and which rows of the tile they are (None: all)."""
    if query_rows is None:
        return slice(tile.start, tile.stop), None
    first, stop = np.searchsorted(query_rows, (tile.start, tile.stop)).tolist()
    return slice(first, stop), torch.from_numpy(query_rows[first:stop] - tile.start).long()


def _tiles(tree: AttentionTree, group: int, causal_below: int = 0) -> Iterator[Tile]:
    """The tree's tiles, neighbours merged up to the size that runs best.

    Paths from a root are left whole where all their depths are below `causal_below`.
    """
    last: Tile | None = None
    for tile in unpack_tiles(tables_of(tree, "dense", prepare).host_tiles.tolist()):
        if last is not None:
            low, high = min(last.min_depth, tile.min_depth), max(last.max_depth, tile.max_depth)
            merged = Tile(last.start, tile.stop, low, high, last.ranges)
            if _is_causal(merged, causal_below):
                last = merged
                continue
            num_keys = sum(stop - start for start, stop, _ in last.ranges)
            most_rows = min(max(MIN_PACKED_ROWS, num_keys // 2), MAX_PACKED_ROWS)
            if (tile.stop - last.start) * group <= most_rows and not _is_causal(last, causal_below):
                last = merged
                continue
            yield last
        last = tile
    if last is not None:
        yield last


def _is_causal(tile: Tile, depths: int | None) -> bool:
    """Whether the tile is a path from a root, long enough to be run as one and within the window.

    Depths grow by at most one per row, so they span as many values as there are rows only on a path.
    """
    length = tile.stop - tile.start
    on_a_path = not tile.ranges and tile.max_depth - tile.min_depth == length - 1
    return on_a_path and length >= MIN_CAUSAL_ROWS and (depths is None or tile.max_depth < depths)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain causal attention: `[T, Hq, D]`, `[T, Hkv, D]` -> `[T, Hq, D]`."""
    rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    grouped = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(rows, heads, -1)


def _host_span_end(tree: AttentionTree) -> list[int] | None:
    return None if tree.span_end is None else tree.span_end.tolist()


def _visible(
    tile: Tile,
    tree: AttentionTree,
    rows: Tensor,
    span_end: list[int] | None,
    window: int | None,
    group: int,
    dtype: torch.dtype,
) -> tuple[list[tuple[int, int]], Tensor]:
    """Ranges of the keys that rows of the tile see, and the mask `[T * G, K]` over those keys."""
    if window is not None and tile.max_depth < window:
        window = None
    ranges, num_full = _ranges(tile, window)
    if span_end is not None:
        # the last range ends with the tile
        ranges[-1] = (ranges[-1][0], span_end[tile.stop - 1])
    keys, rest = [], num_full
    for start, stop in ranges:
        first = min(stop, start + rest)
        rest -= first - start
        if first < stop:
            keys.append((first, stop))
    row = rows[tile.start : tile.stop, None]
    key = _gather_rows(rows, keys)
    hidden = key > row if tree.span_end is None else key >= tree.span_end[tile.start : tile.stop, None]
    hidden |= _gather_rows(tree.end, keys) <= row
    if window is not None:
        hidden |= tree.depth[tile.start : tile.stop, None] - _gather_rows(tree.depth, keys) >= window
    mask = torch.zeros(len(row), group, num_full + len(key), device=row.device, dtype=dtype)
    mask[:, :, num_full:].masked_fill_(hidden[:, None], -torch.inf)
    return ranges, mask.view(len(row) * group, -1)


def _ranges(tile: Tile, window: int | None) -> tuple[list[tuple[int, int]], int]:
    """Ranges of the keys that rows of the tile see, and how many leading keys every row sees."""
    lowest = 0 if window is None else tile.min_depth - window + 1
    ranges: list[tuple[int, int]] = []
    num_full, only_full = 0, window is None
    for start, stop, signed_depth in [*tile.ranges, (tile.start, tile.stop, tile.min_depth)]:
        depth = max(signed_depth, -1 - signed_depth)
        # depths grow by at most one per row, so this drops only keys out of the window, in ranges with gaps too
        start = start if stop == tile.stop else min(stop, start + max(0, lowest - depth))
        only_full = only_full and signed_depth >= 0
        in_full = max(0, min(stop - start, tile.min_depth - depth)) if only_full else 0
        num_full += in_full
        only_full = only_full and in_full == stop - start
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        elif start < stop:
            ranges.append((start, stop))
    return ranges, num_full


def _gather_rows(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    if len(ranges) == 1:
        return x[ranges[0][0] : ranges[0][1]]
    return torch.cat([x[start:stop] for start, stop in ranges])


def _gather(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """`[M, Hkv, D] -> [Hkv, K, D]`, without a copy where the keys are one range."""
    return _gather_rows(x, ranges).transpose(0, 1)


def _scatter_add(x: Tensor, tile: Tensor, ranges: list[tuple[int, int]]) -> None:
    at = 0
    for start, stop in ranges:
        x[start:stop] += tile[:, at : at + stop - start].transpose(0, 1)
        at += stop - start


def _mask_dtype(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
